"""The idx file format of MNIST and its relatives, plain or gzipped.

Layout (yann.lecun.com/exdb/mnist): two zero bytes, a type byte (0x08: unsigned byte), the number of
dimensions, then each dimension's size as a big-endian 32-bit integer, then the values in row-major order.
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Split = Literal["train", "test"]

_UNSIGNED_BYTE = 0x08
IDX_FILES = {
    "train_images": "train-images-idx3-ubyte",
    "train_labels": "train-labels-idx1-ubyte",
    "test_images": "t10k-images-idx3-ubyte",
    "test_labels": "t10k-labels-idx1-ubyte",
}


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Read a file of unsigned bytes. Raises ValueError naming one that is not, or that is cut short."""
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            content = file.read()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: damaged gzip file: {error}") from error
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != _UNSIGNED_BYTE or not 1 <= content[3] <= 4:
        raise ValueError(f"{path}: not an idx file of unsigned bytes")
    header = 4 + 4 * content[3]
    if len(content) < header:
        raise ValueError(f"{path}: cut short within its header of {header} bytes")
    shape = tuple(int(size) for size in np.frombuffer(content, ">u4", count=content[3], offset=4))
    expected = header + math.prod(shape)
    if len(content) != expected:
        raise ValueError(f"{path}: {len(content)} bytes where its header, shape {shape}, asks for {expected}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def read_idx_set(folder: Path, split: Split, name: str) -> dict[str, NDArray[np.uint8]]:
    """Images and labels of one split by the keys of IDX_FILES, from `folder`; `name` is the data set's, for
    messages.

    Raises FileNotFoundError for a file that is missing, ValueError for one that is damaged.
    """
    arrays = {}
    for key in (f"{split}_images", f"{split}_labels"):
        names = (IDX_FILES[key], IDX_FILES[key] + ".gz")
        path = next((folder / file for file in names if (folder / file).is_file()), None)
        if path is None:
            raise FileNotFoundError(f"no {name} in {folder}: {names[0]} or {names[1]} is missing")
        arrays[key] = read_idx(path)
    if arrays[f"{split}_images"].shape[1:] != (28, 28):
        raise ValueError(f"{folder}: images of shape {arrays[f'{split}_images'].shape}, not (N, 28, 28)")
    return arrays
