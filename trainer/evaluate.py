"""Loss and accuracy over a test set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from data.loader import Loader
from trainer.distributed import ranks
from trainer.errors import UserError


@dataclass(frozen=True)
class Metrics:
    """Means over images: cross-entropy in nats, shares of right answers in percent."""

    loss: float
    top1: float
    top5: float
    num_images: int

    @classmethod
    def of(cls, counts: torch.Tensor) -> Metrics:
        """From [sum of losses, top-1 right, top-5 right, images], see trainer.models.classifier. Reads the
        device."""
        loss, top1, top5, images = counts.tolist()
        if images == 0:
            raise UserError("no image of the set could be decoded, so there is nothing to measure")
        return cls(loss / images, 100 * top1 / images, 100 * top5 / images, int(images))

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def evaluate(classifier: Callable[..., Any], loader: Loader, device: torch.device, epoch: int = 0) -> Metrics:
    """Evaluate on every image once, over all ranks. `classifier`: a Classifier or an engine around one; its
    training mode is put back. `epoch`: the next one spares the loader a new start."""
    module: Any = classifier
    was_training = module.training
    module.eval()
    totals = torch.zeros(4, dtype=torch.float64, device=device)
    for images, labels in loader.epoch(epoch):
        _, counts = classifier(images, labels)
        totals += counts
    module.train(was_training)
    return Metrics.of(ranks.sum_over_ranks(totals))
