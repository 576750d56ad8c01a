"""Data sets of in-memory images by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from data.datasets import cifar, fashion_mnist, mnist
from data.datasets.arrays import ImageArrays
from data.datasets.idx import Split

# Each takes a folder (None: where the data set is by default) and a split, and raises FileNotFoundError where
# that is missing, ValueError where a file of it is damaged.
SOURCES: dict[str, Callable[[Path | None, Split], ImageArrays]] = {
    "cifar10": partial(cifar.load, cifar.CIFAR10),
    "cifar100": partial(cifar.load, cifar.CIFAR100),
    "fashion_mnist": fashion_mnist.load,
    "mnist": mnist.load,
}
