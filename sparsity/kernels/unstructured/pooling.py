"""Max pooling of maps that lie in memory with their images innermost: acdc::max_pool and its gradient."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsity.kernels.unstructured import library
from sparsity.kernels.unstructured.operator import as_innermost, empty

_INDICES = {torch.float32: torch.int32, torch.bfloat16: torch.int16}


def takes(maps: Tensor, kernel: Sequence[int]) -> bool:
    """Whether there is code for (N, C, H, W), once its images lie innermost."""
    whole = maps.shape[0] * maps.element_size() % library.vector_bytes() == 0
    known = maps.device.type == "cpu" and maps.dtype in _INDICES
    return maps.dim() == 4 and known and maps.numel() > 0 and whole and kernel[0] * kernel[1] < 2**16


def _pool(maps: Sequence[int], output: Sequence[int], *window: Sequence[int]) -> library.Pool:
    """maps, output: shapes. window: kernel, stride and padding."""
    return library.Pool(maps[1], maps[0], *maps[2:], *output[2:], *itertools.chain(*window))


def _output(maps: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    sizes = zip(maps.shape[2:], kernel, stride, padding, strict=True)
    height, width = ((size + 2 * pad - window) // step + 1 for size, window, step, pad in sizes)
    return empty(maps, maps.shape[0], maps.shape[1], height, width)


@torch.library.custom_op("acdc::max_pool", mutates_args=())
def max_pool(
    maps: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """As torch's max_pool2d, of dilation 1 with whole windows alone; and which pixels were greatest, for the
    gradient."""
    maps = as_innermost(maps)
    assert takes(maps, kernel)
    output = _output(maps, kernel, stride, padding)
    which = torch.empty_like(output, dtype=_INDICES[maps.dtype])
    pool = _pool(maps.shape, output.shape, kernel, stride, padding)
    library.run("max_pool", pool, maps.dtype, maps, output, which)
    return output, which


@max_pool.register_fake
def _(
    maps: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> tuple[Tensor, Tensor]:
    output = _output(maps, kernel, stride, padding)
    return output, torch.empty_like(output, dtype=_INDICES[maps.dtype])


@torch.library.custom_op("acdc::max_pool_gradient", mutates_args=())
def max_pool_gradient(
    gradient: Tensor,
    which: Tensor,
    height: int,
    width: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
) -> Tensor:
    """Of maps of that height and width."""
    gradient = as_innermost(gradient)
    of_maps = empty(gradient, gradient.shape[0], gradient.shape[1], height, width)
    pool = _pool(of_maps.shape, gradient.shape, kernel, stride, padding)
    library.run("max_pool_gradient", pool, gradient.dtype, gradient, which, of_maps)
    return of_maps


@max_pool_gradient.register_fake
def _(gradient: Tensor, which: Tensor, height: int, width: int, *_: Any) -> Tensor:
    return empty(gradient, gradient.shape[0], gradient.shape[1], height, width)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    maps, *ctx.window = inputs
    ctx.size = maps.shape[2:]
    ctx.save_for_backward(output[1])


def _backward(ctx: Any, gradient: Tensor, of_which: Tensor) -> tuple[Tensor | None, ...]:
    return max_pool_gradient(gradient, *ctx.saved_tensors, *ctx.size, *ctx.window), None, None, None


max_pool.register_autograd(_backward, setup_context=_save)
