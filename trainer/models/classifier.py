"""Everything a step computes before the backward pass, as one module, so that it compiles to one graph."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from data.loader import PADDING_LABEL
from trainer.models.freeze import frozen_norms
from trainer.models.mixing import mix


class Classifier(nn.Module):
    """uint8 images -> normalise -> model -> cross-entropy and counts.

    forward(images, labels) takes a data.loader.Batch, in training also a draw of trainer.models.mixing, and
    returns
        in training: the mean loss over all N places, and counts [sum of losses, number right, 0, number of
        images]
        in evaluation: the sum of losses, and counts [sum of losses, top-1 right, top-5 right, number of
        images]
    Counts are float32, (4,), detached. Padding counts nowhere; but as the mean is over all places, an image
    weighs the same in an epoch's filled-up last batch as in the others, over any number of ranks.
    With fewer than 5 classes top-5 is always right. BatchNorms that are frozen stay in evaluation mode.

    label_smoothing: share of the target that is spread evenly over all classes, in training; evaluation knows
    the label alone.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, model: nn.Module, mean: Sequence[float], std: Sequence[float], label_smoothing: float = 0.0
    ) -> None:
        super().__init__()
        self.model = model
        self._frozen = frozen_norms(model)
        self.label_smoothing = label_smoothing
        self.register_buffer("mean", 255 * torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> Classifier:
        super().train(mode)
        for norm in self._frozen:
            norm.eval()
        return self

    def forward(self, images: Tensor, labels: Tensor, draw: Tensor | None = None) -> tuple[Tensor, Tensor]:
        images = (images - self.mean) / self.std
        if draw is None:
            logits = self.model(images).float()
            loss = self._loss(logits, labels)
        else:  # padding carries no loss as either label, so each image that counts weighs 1 in all
            images, others, share = mix(images, labels, draw)
            logits = self.model(images).float()
            loss = share * self._loss(logits, labels) + (1 - share) * self._loss(logits, others)
        num_images = (labels != PADDING_LABEL).sum()
        if self.training:
            right = (logits.detach().argmax(1) == labels).sum()  # of a mixture: the image's own label
            counts = _stack(loss.detach(), right, torch.zeros_like(right), num_images)
            return loss / labels.numel(), counts
        best = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        return loss, _stack(loss.detach(), best[:, 0].sum(), best.sum(), num_images)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        smoothing = self.label_smoothing if self.training else 0.0
        return functional.cross_entropy(
            logits, labels, ignore_index=PADDING_LABEL, reduction="sum", label_smoothing=smoothing
        )


def _stack(*counts: Tensor) -> Tensor:
    return torch.stack([count.float() for count in counts])
