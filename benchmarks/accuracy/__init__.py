"""What methods of sparse training reach, over seeds: sets of runs (tables), their training, their figures."""
