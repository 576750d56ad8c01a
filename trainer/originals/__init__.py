"""Checkpoints and recipes of the paper's implementation, turned into ours. Our own are read elsewhere."""
