"""MNIST (LeCun, Cortes, Burges) from its four idx files: 28 x 28 grey images of 10 digits."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data.datasets.arrays import ImageArrays
from data.datasets.idx import Split, read_idx_set
from data.places import data_home

NUM_CLASSES = 10
MEAN, STD = (0.1307,), (0.3081,)


def load(root: Path | None, split: Split) -> ImageArrays:
    """One split from `root` (default: mnist in the data home). Raises FileNotFoundError or ValueError."""
    root = root or data_home() / "mnist"
    arrays = read_idx_set(root, split, "MNIST")
    images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"].astype(np.int64)
    return ImageArrays(images[..., None], labels, NUM_CLASSES, MEAN, STD, str(root))
