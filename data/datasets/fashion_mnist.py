"""Fashion-MNIST (Xiao, Rasul, Vollgraf 2017; Zalando Research, MIT licence): 28 x 28, grey, 10 classes.

The full set of 60,000 and 10,000 images is used where `prepare` has put it, or from a given folder with its
idx files; otherwise the subset bundled here: the first 1,200 training and 200 test images of each class.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.atomic import whole
from data.datasets.arrays import ImageArrays
from data.datasets.idx import Split, read_idx_set
from data.places import data_home

NAME = "Fashion-MNIST (Debian's package dataset-fashion-mnist has its four files)"
NUM_CLASSES = 10
MEAN, STD = (0.2860,), (0.3530,)
BUNDLED = Path(__file__).parent / "bundled" / "fashion_mnist_subset.npz"
ARCHIVE = "fashion_mnist.npz"
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # of the package dataset-fashion-mnist


def load(root: Path | None, split: Split) -> ImageArrays:
    """One split: from `root` if given (idx files or a prepared archive), else the prepared full set, else the
    subset.

    Raises FileNotFoundError when `root` holds neither, ValueError when a file is damaged.
    """
    if root is not None:
        archive = root / ARCHIVE if (root / ARCHIVE).exists() else None
    else:
        prepared = data_home() / "fashion-mnist" / ARCHIVE
        archive = prepared if prepared.exists() else BUNDLED
    arrays = _read_archive(archive, split) if archive else read_idx_set(root or Path(), split, NAME)
    return _images_of(arrays, split, archive or root)


def prepare(source: Path | None, home: Path) -> Path:
    """Check the four idx files in `source` (default: where Debian's package puts them) and store them as one
    archive under `home`; returns its path. An archive that is there already stays as it is until the new one
    is whole."""
    source = source or DEBIAN_FOLDER
    arrays = {**read_idx_set(source, "train", NAME), **read_idx_set(source, "test", NAME)}
    _images_of(arrays, "train", source)
    _images_of(arrays, "test", source)
    return write_archive(home / "fashion-mnist" / ARCHIVE, arrays)


def _images_of(arrays: Mapping[str, NDArray[np.uint8]], split: Split, source: Path | None) -> ImageArrays:
    images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"].astype(np.int64)
    return ImageArrays(images[..., None], labels, NUM_CLASSES, MEAN, STD, str(source))


def write_archive(path: Path, arrays: Mapping[str, NDArray[np.uint8]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
    return path


def _read_archive(path: Path, split: Split) -> dict[str, NDArray[np.uint8]]:
    keys = (f"{split}_images", f"{split}_labels")
    with path.open("rb") as file:
        try:
            with np.load(file, allow_pickle=False) as archive:
                arrays = {key: archive[key] for key in keys}
        except Exception as error:  # zipfile, zlib and numpy each have several for a damaged or absurd file
            raise ValueError(f"{path}: not a complete Fashion-MNIST archive: {error}") from error
    if not all(isinstance(array, np.ndarray) and array.dtype == np.uint8 for array in arrays.values()):
        raise ValueError(f"{path}: not a Fashion-MNIST archive: images and labels are not unsigned bytes")
    return arrays
