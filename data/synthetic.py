"""Random images on the device: how fast everything but the data is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from data.loader import Batch

NUM_BATCHES = 4  # that take turns: one alone might stay in a cache


class SyntheticLoader:
    """Batches of one shape, of noise made once. See data.loader.Loader.

    num_images: how many a split pretends to have, over all ranks.
    """

    def __init__(
        self,
        num_images: int,
        batches_per_epoch: int,
        batch_size: int,
        size: int,
        num_classes: int,
        device: torch.device,
    ) -> None:
        self.num_images = num_images
        self.batches_per_epoch = batches_per_epoch
        random = torch.Generator(device).manual_seed(0)
        self._batches = []
        for _ in range(min(NUM_BATCHES, batches_per_epoch)):
            shape = (batch_size, size, size, 3)
            images = torch.randint(0, 256, shape, dtype=torch.uint8, device=device, generator=random)
            labels = torch.randint(0, num_classes, (batch_size,), device=device, generator=random)
            self._batches.append(Batch(images.permute(0, 3, 1, 2), labels))

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        for index in range(start, self.batches_per_epoch):
            yield self._batches[(epoch + index) % len(self._batches)]

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        pass

    def fingerprint(self) -> dict[str, Any]:
        return {"backend": "synthetic", "num_images": self.num_images}
