"""Max pooling's gradient on a GPU, in Triton, which torch brings there alone."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # windows times channels of a program


@triton.jit  # type: ignore[untyped-decorator]
def _gather(  # type: ignore[no-untyped-def]
    grad, place, out, height, width, channels, count, block: tl.constexpr
):
    """A thread has a window's channel, and writes the 2 x 2 places of which the window's centre is the first.
    What reaches them is the window itself, those right of it and below it, and the one right below."""
    here = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = here < count
    window = here // channels
    row, column = (window // width) % height, window % width
    right = inside & (column + 1 < width)
    below = inside & (row + 1 < height)
    g = tl.load(grad + here, inside, 0.0).to(tl.float32)
    p = tl.load(place + here, inside, 9)
    g_right = tl.load(grad + here + channels, right, 0.0).to(tl.float32)
    p_right = tl.load(place + here + channels, right, 9)
    line = width * channels
    g_below = tl.load(grad + here + line, below, 0.0).to(tl.float32)
    p_below = tl.load(place + here + line, below, 9)
    g_both = tl.load(grad + here + line + channels, right & below, 0.0).to(tl.float32)
    p_both = tl.load(place + here + line + channels, right & below, 9)
    first = ((window // width) * 4 * width + 2 * column) * channels + here % channels
    corner = tl.where(p == 4, g, 0.0)
    tl.store(out + first, corner, inside)
    corner = tl.where(p == 5, g, 0.0) + tl.where(p_right == 3, g_right, 0.0)
    tl.store(out + first + channels, corner, inside)
    corner = tl.where(p == 7, g, 0.0) + tl.where(p_below == 1, g_below, 0.0)
    tl.store(out + first + 2 * line, corner, inside)
    corner = tl.where(p == 8, g, 0.0) + tl.where(p_right == 6, g_right, 0.0)
    corner += tl.where(p_below == 2, g_below, 0.0) + tl.where(p_both == 0, g_both, 0.0)
    tl.store(out + first + 2 * line + channels, corner, inside)


def max_pool_gradient(grad: Tensor, place: Tensor) -> Tensor:
    """As trainer.models.stem's."""
    grad, place = (each.contiguous(memory_format=torch.channels_last) for each in (grad, place))
    images, channels, height, width = grad.shape
    shape = (images, channels, 2 * height, 2 * width)
    out = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=torch.channels_last)
    count = grad.numel()
    _gather[(triton.cdiv(count, BLOCK),)](grad, place, out, height, width, channels, count, BLOCK)
    return out
