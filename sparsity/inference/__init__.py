"""Finished sparse models in use: their file without zeros, and how they run. How masked layers train:
kernels."""

from sparsity.inference.file import read, save
from sparsity.inference.model import accelerated, load

__all__ = ["accelerated", "load", "read", "save"]
