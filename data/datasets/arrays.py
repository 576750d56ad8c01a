"""Images that fit in memory, as arrays."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from data.loader import ImageInfo


@dataclass(frozen=True, eq=False)
class ImageArrays:
    """One split of a data set, with what the model and the normalisation need to know of it.

    images: uint8, (N, H, W, C). labels: int64, (N,), in 0 .. num_classes - 1.
    mean, std: per channel, of pixel values scaled to 0 .. 1. source: where it came from, for people.
    Raises ValueError when shapes, types or label values contradict each other.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str

    def __post_init__(self) -> None:
        if self.images.dtype != np.uint8 or self.images.ndim != 4 or len(self.images) == 0:
            raise ValueError(
                f"{self.source}: images are {self.images.dtype} {self.images.shape}, not uint8 (N, H, W, C)"
            )
        if self.labels.dtype != np.int64 or self.labels.shape != self.images.shape[:1]:
            raise ValueError(
                f"{self.source}: labels are {self.labels.dtype} {self.labels.shape}, "
                f"not one int64 for each of {len(self.images)} images"
            )
        if self.labels.min() < 0 or self.labels.max() >= self.num_classes:
            raise ValueError(
                f"{self.source}: labels run from {self.labels.min()} to {self.labels.max()}, not within "
                f"0 .. {self.num_classes - 1}"
            )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image, as a model takes it."""
        _, height, width, channels = self.images.shape
        return channels, height, width

    @property
    def info(self) -> ImageInfo:
        return ImageInfo(self.shape, self.num_classes, self.mean, self.std)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over images and labels."""
        digest = hashlib.sha256(np.ascontiguousarray(self.images).data)
        digest.update(np.ascontiguousarray(self.labels).data)
        return digest.hexdigest()
