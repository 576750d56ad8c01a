"""What every source of batches gives the training loop, whatever it reads and with what."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor

PADDING_LABEL = -1  # fills the last evaluation batch, so that every batch has one shape


@dataclass(frozen=True)
class ImageInfo:
    """What a model needs to know of the images it gets.

    shape: (channels, height, width) in evaluation. mean, std: per channel, of pixel values scaled to 0 .. 1.
    classes: their names by number, empty where they have none.
    """

    shape: tuple[int, int, int]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...] = ()


class Batch(NamedTuple):
    """images: uint8, (N, C, H, W) in channels_last memory, on the training device, not normalised.
    labels: int64, (N,), on the same device; PADDING_LABEL marks an image that does not count."""

    images: Tensor
    labels: Tensor


class Loader(Protocol):
    """This rank's share of one split."""

    @property
    def num_images(self) -> int:
        """Images in the split, over all ranks."""

    @property
    def batches_per_epoch(self) -> int:
        """Batches that this rank gets in an epoch: the same number on every rank."""

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The epoch's batches from number `start` on. What comes depends on (epoch, start) alone, so a
        resumed run sees what the uninterrupted one would have seen."""

    def state(self) -> dict[str, Any]:
        """What helps to be where this rank is now, beside (epoch, start), in plain values; mostly nothing."""

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take the state back, before its epoch is asked for. Raises ValueError for a damaged one."""

    def fingerprint(self) -> dict[str, Any]:
        """Everything that shapes the stream, in plain values: a checkpoint resumes only into the same."""
