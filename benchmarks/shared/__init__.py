"""What benchmarks share: the networks that they run, turns, records with provenance. No benchmark."""
