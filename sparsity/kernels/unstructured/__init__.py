"""Sparse kernels for CPUs: convolutions and linear layers with any mask. Their C++ is in native/; what one
layer runs is in plan.py, in inference in frozen.py; its operators are in operator.py, what is measured and
chosen in family.py. What stands between such layers is in batch_norm.py and pooling.py, and fusion.py puts it
into compiled graphs."""
