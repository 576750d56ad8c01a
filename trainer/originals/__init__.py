"""Checkpoints and recipes of the paper's implementation, turned into ours. Our own are read elsewhere."""

from trainer.originals.checkpoints import load_original

__all__ = ["load_original"]
