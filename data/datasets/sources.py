"""Data sets of in-memory images by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from data.datasets import cifar, fashion_mnist, mnist
from data.datasets.arrays import ImageArrays
from data.datasets.idx import Split

SOURCES: dict[str, Callable[[Path | None, Split], ImageArrays]] = {
    "cifar10": partial(cifar.load, cifar.CIFAR10),
    "cifar100": partial(cifar.load, cifar.CIFAR100),
    "fashion_mnist": fashion_mnist.load,
    "mnist": mnist.load,
}


def load(name: str, root: Path | None, split: Split) -> ImageArrays:
    """One split of a data set, from `root` or from where that data set is by default.

    Raises FileNotFoundError where it is missing, ValueError where a file of it is damaged.
    """
    return SOURCES[name](root, split)
