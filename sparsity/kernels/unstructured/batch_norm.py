"""BatchNorm in training steps, with the ReLU and the addition behind it: acdc::batch_norm and its gradient.

Maps are (images, channels, height, width), float32 or bfloat16, with their images innermost in memory.
Each result is computed in float32 and rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsity.kernels.unstructured import library
from sparsity.kernels.unstructured.operator import as_innermost, is_innermost
from sparsity.kernels.unstructured.plan import PAST_CACHES

NOTHING, RELU, ADD_RELU = range(3)  # behind BatchNorm


def takes(maps: Tensor) -> bool:
    """Whether there is code for such maps."""
    return (
        maps.dim() == 4
        and maps.shape[0] > 1
        and maps.device.type == "cpu"
        and maps.dtype in (torch.float32, torch.bfloat16)
        and maps.numel() > 0
        and is_innermost(maps)
        and maps[:, 0].numel() * maps.element_size() % library.vector_bytes() == 0
    )


def _norm(maps: Tensor, epsilon: float, behind: int) -> library.Norm:
    past_caches = maps.nbytes >= PAST_CACHES
    return library.Norm(maps.shape[1], maps[:, 0].numel(), epsilon, behind, past_caches)


@torch.library.custom_op("acdc::batch_norm", mutates_args=())
def batch_norm(
    maps: Tensor, other: Tensor | None, weight: Tensor, bias: Tensor, epsilon: float, relu: bool
) -> tuple[Tensor, Tensor]:
    """(relu(batch_norm(maps) + other), statistics). other: None for nothing to add, else relu is True.
    statistics: (3, channels), mean, 1 / standard deviation, unbiased variance."""
    maps, other = as_innermost(maps), None if other is None else as_innermost(other)
    assert takes(maps)
    behind = ADD_RELU if other is not None else RELU if relu else NOTHING
    output, statistics = torch.empty_like(maps), weight.new_empty(3, len(weight))
    norm = _norm(maps, epsilon, behind)
    library.run("batch_norm", norm, maps.dtype, maps, other, weight, bias, output, statistics)
    return output, statistics


@batch_norm.register_fake
def _(maps: Tensor, other: Tensor | None, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(maps), weight.new_empty(3, len(weight))


@torch.library.custom_op("acdc::batch_norm_gradient", mutates_args=())
def batch_norm_gradient(
    gradient: Tensor,
    maps: Tensor,
    output: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    statistics: Tensor,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of maps, of other, and (2, channels) of weight and bias. output: of batch_norm with `other`, else None,
    and then the gradient of other is empty."""
    behind = ADD_RELU if output is not None else RELU if relu else NOTHING
    gradient, maps = as_innermost(gradient), as_innermost(maps)
    of_maps, of_other, of_weights = _gradients(maps, output, weight)
    norm, known = _norm(maps, 0.0, behind), (gradient, maps, output, weight, bias, statistics)
    library.run("batch_norm_gradient", norm, maps.dtype, *known, of_maps, of_other, *of_weights)
    return of_maps, of_other, of_weights


@batch_norm_gradient.register_fake
def _(gradient: Tensor, maps: Tensor, output: Tensor | None, weight: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return _gradients(maps, output, weight)


def _gradients(maps: Tensor, output: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Still to be filled in."""
    of_other = maps.new_empty(0) if output is None else torch.empty_like(maps)
    return torch.empty_like(maps), of_other, weight.new_empty(2, len(weight))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    maps, other, weight, bias, _, ctx.relu = inputs
    ctx.save_for_backward(maps, None if other is None else output[0], weight, bias, output[1])


def _backward(ctx: Any, gradient: Tensor, of_statistics: Tensor) -> tuple[Tensor | None, ...]:
    maps, output, weight, bias, statistics = ctx.saved_tensors
    of_maps, of_other, of_weights = batch_norm_gradient(
        gradient, maps, output, weight, bias, statistics, ctx.relu
    )
    return of_maps, None if output is None else of_other, of_weights[0], of_weights[1], None, None


batch_norm.register_autograd(_backward, setup_context=_save)
