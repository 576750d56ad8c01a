"""A validation set split off where there is none: of each class, a share that follows from a seed.

Which images it takes depends on the seed and on their paths in ROOT alone. So evaluation later finds the same
ones, and excluding a damaged file moves no other.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.datasets.idx import Split
from data.images.files import ImageFiles, has_images, load_image_files
from data.images.layout import class_root


def load_share(root: Path, split: Split, share: float, seed: int, keep_excluded: bool = False) -> ImageFiles:
    """The training images of `root` but for the share of each class ("train"), or that share ("test"). At
    least one image of a class stays in training; where it has two or more, one or more go to validation.

    keep_excluded: see load_image_files, whose errors this raises; and those of data.images.layout.class_root,
    ValueError where a class has no image, and where none has two.
    """
    files = load_image_files(root, "train", keep_excluded=True, training=class_root(root, has_images))
    counts = np.bincount(files.labels, minlength=files.num_classes)
    if empty := [name for name, count in zip(files.classes, counts, strict=True) if not count]:
        raise ValueError(
            f"{root}: no images in {', '.join(empty[:5])}, which would count as a class; remove that folder"
        )
    chosen = choose_share(files, share, seed)
    if not chosen.any():
        raise ValueError(f"{root}: no class has two images, so none can be split off for validation")
    numbers = np.flatnonzero(chosen if split == "test" else ~chosen)
    part = files.take(numbers)
    return part if keep_excluded else part.without_excluded()


def choose_share(files: ImageFiles, share: float, seed: int) -> NDArray[np.bool_]:
    """Which files are validation's: (N,)."""
    chosen = np.zeros(len(files), np.bool_)
    for label in range(files.num_classes):
        numbers = np.flatnonzero(files.labels == label)
        count = min(len(numbers) - 1, max(1, round(share * len(numbers))))
        keys = {number: _key(seed, files.files[number]) for number in numbers.tolist()}
        chosen[sorted(keys, key=keys.__getitem__)[: max(count, 0)]] = True
    return chosen


def _key(seed: int, file: str) -> bytes:
    return hashlib.sha256(b"%d %s" % (seed, os.fsencode(file))).digest()
