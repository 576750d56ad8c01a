"""Passes over data that train nothing: loss and accuracy; BatchNorm statistics recomputed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, count, islice
from typing import Any

import torch
from torch import nn

from data.loader import PADDING_LABEL, Loader
from trainer.distributed import ranks
from trainer.errors import UserError
from trainer.models.classifier import Classifier


@dataclass(frozen=True)
class Metrics:
    """Means over images: cross-entropy in nats, shares of right answers in percent."""

    loss: float
    top1: float
    top5: float
    num_images: int

    @classmethod
    def of(cls, counts: torch.Tensor) -> Metrics:
        """From the counts of trainer.models.classifier, as evaluation gives them. Reads the device."""
        loss, top1, top5, images = counts.tolist()
        if images == 0:
            raise UserError("no image of the set could be decoded, so there is nothing to measure")
        return cls(loss / images, 100 * top1 / images, 100 * top5 / images, int(images))


class Interrupted(Exception):
    """A pass was given up."""


@torch.no_grad()
def evaluate(
    classifier: Callable[..., Any],
    loader: Loader,
    device: torch.device,
    epoch: int = 0,
    should_stop: Callable[[], bool] = lambda: False,
) -> Metrics:
    """Evaluate on every image once, over all ranks. `classifier`: a Classifier or an engine around one; its
    training mode is put back. `epoch`: the next one spares the loader a new start. should_stop: asked after
    each batch, on all ranks alike; raises Interrupted where it says so."""
    module: Any = classifier
    was_training = module.training
    module.eval()
    totals = torch.zeros(4, dtype=torch.float64, device=device)
    try:
        for images, labels in loader.epoch(epoch):
            _, counts = classifier(images, labels)
            totals += counts
            if should_stop():
                raise Interrupted
    finally:
        module.train(was_training)
    return Metrics.of(ranks.sum_over_ranks(totals))


@torch.no_grad()
def confusion(
    classifier: Classifier,
    loader: Loader,
    epoch: int,
    autocast: torch.autocast,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> torch.Tensor:
    """Counts (C, C) of this rank's share: images by their class (row) and the model's answer (column). The
    pass runs uncompiled: it would cost a graph, and comes once, at a run's end. epoch: see evaluate.
    on_progress: called with the number of batches done, and of all."""
    num_classes, counts = 0, torch.zeros(0)
    was_training = classifier.training
    classifier.eval()
    try:
        for done, (images, labels) in enumerate(loader.epoch(epoch), 1):
            with autocast:
                logits = classifier.model((images - classifier.mean) / classifier.std)
            if not num_classes:
                num_classes = logits.shape[1]
                counts = torch.zeros(num_classes**2 + 1, dtype=torch.int64, device=logits.device)
            places = labels * num_classes + logits.argmax(1)
            places = torch.where(labels == PADDING_LABEL, num_classes**2, places)  # the last, left out
            counts.scatter_add_(0, places, torch.ones_like(places))
            on_progress(done, loader.batches_per_epoch)
    finally:
        classifier.train(was_training)
    return counts[:-1].view(num_classes, num_classes)


@torch.no_grad()
def recompute_batch_norm(
    classifier: nn.Module,
    loader: Loader,
    epoch: int,
    num_batches: int,
    autocast: torch.autocast,
    should_stop: Callable[[], bool] = lambda: False,
) -> None:
    """Replace the running statistics of every BatchNorm by the plain average over the first `num_batches`
    training batches of `epoch` on all ranks, passing over further epochs' where one is not enough: right
    after a compression they still describe the dense model.

    The pass runs uncompiled and in training mode, dropout included, as the paper's implementation does it;
    that one lets the moving average drift instead of averaging. should_stop: as evaluate's.
    """
    norms = [
        module
        for module in classifier.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training  # frozen ones keep theirs
    ]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average
    batches = chain.from_iterable(map(loader.epoch, count(epoch)))
    for images, labels in islice(batches, num_batches):
        with autocast:
            classifier.forward(images, labels)
        if should_stop():
            raise Interrupted
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    ranks.average_buffers(classifier)
