"""The idx file format of MNIST and its relatives, plain or gzipped.

Layout (yann.lecun.com/exdb/mnist): two zero bytes, a type byte (0x08: unsigned byte), the number of
dimensions, then each dimension's size as a big-endian 32-bit integer, then the values in row-major order.
"""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_UNSIGNED_BYTE = 0x08


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Read a file of unsigned bytes. Raises ValueError naming the file where it is not one or is cut
    short."""
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
    expected = header + int(np.prod(shape, dtype=np.int64))
    if len(content) != expected:
        raise ValueError(f"{path}: {len(content)} bytes where its header, shape {shape}, asks for {expected}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)
