"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) from the files as distributed: the binary or the python version.

The python version is made of pickles. They are read without running anything in them: the reader knows the
few globals that numpy arrays and strings need, and refuses every other.
"""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.datasets.arrays import ImageArrays
from data.datasets.idx import Split
from data.places import data_home

PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class Variant:
    """Names inside the distributed archives. label_bytes: bytes before each binary image, the last is the
    label. label_key: of the fine labels in a pickle. mean, std: the paper's normalisation."""

    name: str
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    binary_folder: str
    python_folder: str
    binary: dict[Split, list[str]]
    python: dict[Split, list[str]]
    label_bytes: int
    label_key: bytes


CIFAR10 = Variant(
    name="CIFAR-10",
    num_classes=10,
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2023, 0.1994, 0.2010),
    binary_folder="cifar-10-batches-bin",
    python_folder="cifar-10-batches-py",
    binary={"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]},
    python={"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]},
    label_bytes=1,
    label_key=b"labels",
)
CIFAR100 = Variant(
    name="CIFAR-100",
    num_classes=100,
    mean=(0.5071, 0.4867, 0.4408),
    std=(0.2675, 0.2565, 0.2761),
    binary_folder="cifar-100-binary",
    python_folder="cifar-100-python",
    binary={"train": ["train.bin"], "test": ["test.bin"]},
    python={"train": ["train"], "test": ["test"]},
    label_bytes=2,
    label_key=b"fine_labels",
)


def load(variant: Variant, root: Path | None, split: Split) -> ImageArrays:
    """One split from `root` (default: the data home): the folder that the distributed archive unpacks to, or
    one that holds it.

    Raises FileNotFoundError when no version is there whole, ValueError naming the file that is damaged.
    """
    root = root or data_home()
    for parent in (root, root.parent):
        for folder, names, read in (
            (parent / variant.binary_folder, variant.binary[split], _read_binary),
            (parent / variant.python_folder, variant.python[split], _read_python),
        ):
            if folder.is_dir() and (parent == root or folder == root):
                parts = [read(variant, folder / name) for name in names]
                images = np.concatenate([images for images, _ in parts])
                labels = np.concatenate([labels for _, labels in parts])
                hwc = np.ascontiguousarray(images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
                return ImageArrays(hwc, labels, variant.num_classes, variant.mean, variant.std, str(folder))
    raise FileNotFoundError(
        f"no {variant.name} in {root}: unpack its archive there, so that {variant.binary_folder} or "
        f"{variant.python_folder} lies in it"
    )


def _read_binary(variant: Variant, path: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Records of label bytes and 3,072 pixels: red, green, blue, each row by row."""
    content = _read(variant, path)
    record = variant.label_bytes + PIXELS
    if not content or len(content) % record:
        raise ValueError(
            f"{path}: {len(content)} bytes are not a whole number of {variant.name} records of {record}"
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, record)
    return records[:, variant.label_bytes :], records[:, variant.label_bytes - 1].astype(np.int64)


def _read_python(variant: Variant, path: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    content = _read(variant, path)
    try:
        batch = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # whatever a damaged pickle makes of the unpickler
        raise ValueError(f"{path}: not a {variant.name} batch: {error}") from error
    images = batch.get(b"data") if isinstance(batch, dict) else None
    labels = batch.get(variant.label_key) if isinstance(batch, dict) else None
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape[1:] != (PIXELS,):
        raise ValueError(f"{path}: not a {variant.name} batch: it holds no uint8 images (N, {PIXELS})")
    known = range(variant.num_classes)
    if not isinstance(labels, list) or len(labels) != len(images):
        raise ValueError(
            f"{path}: not a {variant.name} batch: it holds no label for each of {len(images)} images"
        )
    if strange := [label for label in labels if not isinstance(label, int) or label not in known]:
        raise ValueError(f"{path}: not a {variant.name} batch: {strange[0]!r:.40} is no label")
    return images, np.asarray(labels, np.int64)


def _read(variant: Variant, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{variant.name} is incomplete: {path} is missing") from error


class _Unpickler(pickle.Unpickler):
    """Builds what a CIFAR batch consists of; any other global is refused by name, and nothing is executed."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {
            "numpy.core.multiarray": ("_reconstruct",),
            "numpy._core.multiarray": ("_reconstruct",),
            "numpy": ("ndarray", "dtype"),
            "_codecs": ("encode",),
        }
        if name not in allowed.get(module, ()):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR batch needs")
        if name == "_reconstruct":
            from numpy._core.multiarray import _reconstruct

            return _reconstruct
        return super().find_class(module, name)
