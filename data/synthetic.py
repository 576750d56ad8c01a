"""Random images on the device: how fast everything but the data is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from data.loader import Batch

NUM_BATCHES = 4  # that take turns: one alone might stay in a cache


class SyntheticLoader:
    """Batches of noise made once. See data.loader.Loader.

    num_images: how many a split pretends to have, over all ranks. size: epoch -> side of the images.
    """

    def __init__(
        self,
        num_images: int,
        batches_per_epoch: int,
        batch_size: int,
        size: Callable[[int], int],
        num_classes: int,
        device: torch.device,
    ) -> None:
        self.num_images, self.batches_per_epoch, self.batch_size = num_images, batches_per_epoch, batch_size
        self.size, self.num_classes, self.device = size, num_classes, device
        self._batches: list[Batch] = []

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        if not self._batches or self._batches[0].images.shape[2] != self.size(epoch):
            self._batches = list(self._noise(self.size(epoch)))
        for index in range(start, self.batches_per_epoch):
            yield self._batches[(epoch + index) % len(self._batches)]

    def _noise(self, side: int) -> Iterator[Batch]:
        random = torch.Generator(self.device).manual_seed(0)
        for _ in range(min(NUM_BATCHES, self.batches_per_epoch)):
            shape = (self.batch_size, side, side, 3)
            images = torch.randint(0, 256, shape, dtype=torch.uint8, device=self.device, generator=random)
            labels = torch.randint(0, self.num_classes, shape[:1], device=self.device, generator=random)
            yield Batch(images.permute(0, 3, 1, 2), labels)

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        pass

    def fingerprint(self) -> dict[str, Any]:
        return {"backend": "synthetic", "batch_size": self.batch_size}
