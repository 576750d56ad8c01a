"""Random crops of images of any size: draws that do not know the image yet, and the window they give.

The law is torchvision's RandomResizedCrop (Szegedy et al. 2015): a share of the area, an aspect ratio, a
place; ten attempts to fit the image, else the largest central window whose ratio is allowed. data.dali.decode
writes the same law in DALI's terms, in the same float32 arithmetic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.stream import TrainStream

ATTEMPTS = 10
RATIOS = (3 / 4, 4 / 3)  # width to height


class CropDraw(NamedTuple):
    """What one training batch of one rank is made of.

    indices: int64, and counts: bool, (N,), see data.stream.Draw. area, ratio: float32, (N, ATTEMPTS), shares
    of the image's area and widths to heights. place: float32, (N, 2), in 0 .. 1, where the window lies, down
    and right. flip: int32, (N,). operations, levels: see data.stream.Draw. size: side of the square image
    that becomes of the window, in pixels."""

    indices: NDArray[np.int64]
    counts: NDArray[np.bool_]
    area: NDArray[np.float32]
    ratio: NDArray[np.float32]
    place: NDArray[np.float32]
    flip: NDArray[np.int32]
    operations: NDArray[np.int32]
    levels: NDArray[np.int32]
    size: int


@dataclass(frozen=True)
class CropStream(TrainStream):
    """TrainStream with resized crops. min_area: the least share of the image. sizes: (epoch, side) pairs in
    rising order, from which epoch on crops are resized to which side; the first is (0, side)."""

    min_area: float = 0.08
    sizes: tuple[tuple[int, int], ...] = ((0, 224),)

    def size(self, epoch: int) -> int:
        return next(side for begin, side in reversed(self.sizes) if begin <= epoch)

    def draw(self, epoch: int, index: int) -> CropDraw:  # type: ignore[override]
        indices, counts, mine, random = self.place(epoch, index)
        shape = (self.global_batch, ATTEMPTS)
        area = random.uniform(self.min_area, 1, shape).astype(np.float32)[mine]
        logarithms = random.uniform(math.log(RATIOS[0]), math.log(RATIOS[1]), shape)
        ratio = np.exp(logarithms).astype(np.float32)[mine]
        place = random.random((self.global_batch, 2), np.float32)[mine]
        flip = random.integers(0, 1, self.global_batch, dtype=np.int32, endpoint=True)[mine]
        flip = flip if self.flip else np.zeros_like(flip)
        operations, levels = (part[mine] for part in self.draw_operations(random))
        return CropDraw(indices, counts, area, ratio, place, flip, operations, levels, self.size(epoch))

    def fingerprint(self) -> dict[str, Any]:
        sizes = [list(pair) for pair in self.sizes]
        return {**super().fingerprint(), "min_area": self.min_area, "sizes": sizes}


def window(draw: CropDraw, i: int, height: int, width: int) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the draw's i-th crop, within an image of that height and width: no side
    is less than a pixel, however small the image."""
    h, w = np.float32(height), np.float32(width)
    half, pixels = np.float32(0.5), h * w * draw.area[i]
    widths = np.floor(np.sqrt(pixels * draw.ratio[i]) + half)
    heights = np.floor(np.sqrt(pixels / draw.ratio[i]) + half)
    fits = np.flatnonzero((widths >= 1) & (widths <= w) & (heights >= 1) & (heights <= h))
    if len(fits):
        ch, cw = heights[fits[0]], widths[fits[0]]
        top, left = np.floor(draw.place[i] * np.array([h - ch + 1, w - cw + 1]))
    else:
        narrowest, widest = map(np.float32, RATIOS)
        cw = min(w, np.floor(h * widest + half))
        ch = min(h, np.floor(w / narrowest + half))
        top, left = np.floor((h - ch) * half), np.floor((w - cw) * half)
    return int(top), int(left), int(ch), int(cw)


def central(height: int, width: int, resize: int, size: int) -> tuple[int, int, int, int]:
    """Evaluation's (new height, new width, top, left): the shorter side becomes `resize`, the crop from the
    centre has the side `size`. torchvision's rounding."""
    new_height = resize * height // min(height, width)
    new_width = resize * width // min(height, width)
    return new_height, new_width, round((new_height - size) / 2), round((new_width - size) / 2)
