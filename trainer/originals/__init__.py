"""Checkpoints and recipes of the paper's implementation, turned into ours. Our own are read elsewhere."""

from trainer.originals.checkpoints import OriginalError, load_original

__all__ = ["OriginalError", "load_original"]
