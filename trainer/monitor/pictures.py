"""Pictures and tables for TensorBoard: what a model sees, what layers keep, which classes are confused."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from data.loader import PADDING_LABEL
from trainer.models.mixing import mix

SHOWN = 16  # images of a batch, an even number: mixing pairs neighbours
_GAP, _SMALL = 2, 64  # pixels between images; shorter sides are enlarged
_PAIRS = 20  # of classes


def as_seen(images: Tensor, labels: Tensor, draw: Tensor | None = None) -> tuple[Tensor, Tensor, float]:
    """The first images of a batch as the model gets them, augmented and mixed, but before normalisation: a
    batch is uint8 until then, so no pixel has to be computed back. Their labels; the share that these have
    in a mixture. images, labels: see data.loader.Batch. draw: of trainer.models.mixing. Reads the device."""
    images, labels, share = images[:SHOWN], labels[:SHOWN], 1.0
    if draw is not None:
        mixed, _, own = mix(images.float(), labels, draw)
        images, share = mixed.round().to(torch.uint8), float(own)
    return images.cpu(), labels.cpu(), share


def grid(images: Tensor) -> NDArray[np.uint8]:
    """uint8 (N, C, H, W), C of 1 or 3 -> one picture (height, width, C), images in rows, small ones enlarged
    by whole factors."""
    pixels = images.permute(0, 2, 3, 1).numpy()
    factor = max(1, math.ceil(_SMALL / max(pixels.shape[1:3])))
    pixels = pixels.repeat(factor, axis=1).repeat(factor, axis=2)
    count, height, width, channels = pixels.shape
    across = math.ceil(math.sqrt(count))
    down = math.ceil(count / across)
    shape = (down * (height + _GAP) - _GAP, across * (width + _GAP) - _GAP, channels)
    picture = np.full(shape, 255, dtype=np.uint8)
    for i, each in enumerate(pixels):
        top, left = i // across * (height + _GAP), i % across * (width + _GAP)
        picture[top : top + height, left : left + width] = each
    return picture


def label_table(labels: Tensor, share: float, classes: Sequence[str]) -> str:
    """Markdown: the labels where their images are in the grid."""
    names = [_name(int(label), classes) for label in labels]
    across = math.ceil(math.sqrt(len(names)))
    rows = [names[i : i + across] for i in range(0, len(names), across)]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    mixed = [] if share == 1 else ["", f"Mixed: each image's own label counts {100 * share:.0f} %."]
    return "\n".join([lines[0], "|" + "---|" * across, *lines[1:], *mixed])


def kept_by_layer(layer_sparsity: Mapping[str, float]) -> Figure:
    """Bars: the share of weights that each layer keeps, in the network's order."""
    figure = Figure(figsize=(7, 1 + 0.22 * len(layer_sparsity)), layout="constrained")
    axes = figure.subplots()
    axes.barh(list(layer_sparsity), [100 * (1 - share) for share in layer_sparsity.values()], color="#c8590a")
    axes.invert_yaxis()
    axes.set_xlabel("weights kept, %")
    return figure


def confused_table(counts: Tensor, classes: Sequence[str]) -> str:
    """Markdown: the pairs of classes that are taken for each other most often. counts: (C, C), on the CPU, of
    images by their class (row) and the model's answer (column)."""
    wrong = counts.clone().fill_diagonal_(0)
    of_class = counts.sum(1)
    images, right = int(counts.sum()), int(counts.diagonal().sum())
    most = wrong.flatten().topk(min(_PAIRS, wrong.numel()))
    lines = [f"{right:,} of {images:,} test images are right ({100 * right / max(images, 1):.2f} %).", ""]
    lines += ["| class | taken for | images | of the class |", "|---|---|---:|---:|"]
    for number, place in zip(most.values.tolist(), most.indices.tolist(), strict=True):
        if number:
            true, answer = divmod(place, counts.shape[1])
            share = f"{100 * number / int(of_class[true]):.1f} %"
            lines.append(f"| {_name(true, classes)} | {_name(answer, classes)} | {number:,} | {share} |")
    return "\n".join(lines)


def _name(label: int, classes: Sequence[str]) -> str:
    if label == PADDING_LABEL:
        return "-"
    return classes[label].replace("|", "/") if label < len(classes) else str(label)
