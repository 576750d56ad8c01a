"""Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019), by the law of timm's Mixup in its mode "batch": one
draw for a whole batch, from (seed, epoch, step) alone.

Images are mixed with their neighbours, places 2 i and 2 i + 1 of a batch with each other. Their order is
random anyway, and so a mixture is the same however many devices and micro-batches share a step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trainer.config.optimization import MixingConfig

_STREAM = 2  # of random numbers under the run's seed, beside those of data.stream
_WIDTH = 8  # of a draw in floats: rows of a table begin at multiples of 32 bytes
_STEPS = 256  # drawn at once


@dataclass
class Mixer:
    """Draws of a run, many steps' at a time on its device: no step waits for it."""

    config: MixingConfig
    seed: int
    _key: tuple[int, ...] = ()
    _rows: Tensor | None = None

    def draw(self, epoch: int, step: int, height: int, width: int) -> tuple[float, ...]:
        """(share that an image keeps outside the box; the box: top, bottom, left, right, in pixels; share of
        the image's own label). Inside the box the image is its partner."""
        random, config = np.random.default_rng((self.seed, _STREAM, epoch, step)), self.config
        if random.random() >= config.probability:
            return 1.0, 0, 0, 0, 0, 1.0
        is_cut = config.cutmix > 0
        if config.cutmix and config.mixup:
            is_cut = random.random() < config.switch
        alpha = config.cutmix if is_cut else config.mixup
        share = float(random.beta(alpha, alpha))
        if not is_cut or share == 1:
            return share, 0, 0, 0, 0, share
        ratio = math.sqrt(1 - share)
        sides = []
        for side in (height, width):
            cut, centre = int(side * ratio), int(random.integers(0, side))
            sides += [max(centre - cut // 2, 0), min(centre + (cut + 1) // 2, side)]
        top, bottom, left, right = sides
        return 1.0, top, bottom, left, right, 1 - (bottom - top) * (right - left) / (height * width)

    def row(self, epoch: int, step: int, images: Tensor) -> Tensor:
        """The step's draw for `mix`, on the images' device."""
        height, width = images.shape[-2:]
        first = step - step % _STEPS
        if self._rows is None or self._key != (epoch, first, height, width):
            draws, steps = torch.zeros(_STEPS, _WIDTH), range(first, first + _STEPS)
            draws[:, :6] = torch.tensor([self.draw(epoch, step, height, width) for step in steps])
            if images.is_cuda:
                draws = draws.pin_memory()  # copied without a wait
            self._rows = draws.to(images.device, non_blocking=True)
            self._key = (epoch, first, height, width)
        return self._rows[step - first]


def check_pairs(batch_size: int) -> None:
    """batch_size: of a micro-batch on a device. Raises ValueError."""
    if batch_size % 2:
        raise ValueError(
            f"images are mixed in pairs, and a device gets {batch_size} at a time; choose data.batch_size so "
            "that its share for each device and micro-batch is even"
        )


def mix(images: Tensor, labels: Tensor, draw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """images: (N, C, H, W), floating point; labels: (N,); draw: a Mixer's row. Returns mixed images, the
    labels of partners, and the share of the images' own labels, a scalar tensor."""
    partner = torch.arange(len(labels), device=labels.device) ^ 1
    rows = torch.arange(images.shape[2], device=images.device)[:, None]
    columns = torch.arange(images.shape[3], device=images.device)
    inside = (rows >= draw[1]) & (rows < draw[2]) & (columns >= draw[3]) & (columns < draw[4])
    keep = torch.where(inside, 0.0, draw[0])
    mixed = images * keep + images[partner] * (1 - keep)
    return mixed.contiguous(memory_format=torch.channels_last), labels[partner], draw[5]
