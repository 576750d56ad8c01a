"""Operators of masked layers on a CPU: acdc::gather and its gradients, by a layer's plan; and between memory
formats.

Activations have torch's shape, (images, channels, height, width), and lie in memory with their images
innermost. torch.compile keeps that format through what works element by element, so that it is converted to
where the first such layer stands, and from behind the last.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsity.kernels.unstructured import library

# The kernels that numbers stand for in compiled code: a kernel's plan may change, its number does not
PLANNED: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
# Likewise, of layers, in inference
CHAINS: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def _plan(number: Tensor) -> Any:
    """number: a tensor, which compiled code takes as it takes weights. It would hold a plain number to be
    part of the code, and compile that anew for each layer."""
    kernel = PLANNED.get(int(number))
    if kernel is None or kernel.plan is None:
        raise RuntimeError("the layer's kernel was taken away after the forward pass: do it between steps")
    return kernel.plan


def is_innermost(maps: Tensor) -> bool:
    """Whether (N, C, H, W) lies in memory as (C, H, W, N), without gaps."""
    return maps.permute(1, 2, 3, 0).is_contiguous()


def as_innermost(maps: Tensor) -> Tensor:
    """The same if they lie so, else a copy."""
    return maps if is_innermost(maps) else to_innermost(maps)


def _maps(maps: Tensor) -> Tensor:
    """(C, H, W, N), contiguous, of (N, C, H, W)."""
    return as_innermost(maps).permute(1, 2, 3, 0)


def empty(like: Tensor, images: int, channels: int, height: int, width: int) -> Tensor:
    """With images innermost. No view: what an operator returns may be changed in place."""
    strides = (1, height * width * images, width * images, images)
    return like.new_empty_strided((images, channels, height, width), strides)


@torch.library.custom_op("acdc::gather", mutates_args=())
def gather(maps: Tensor, weight: Tensor, height: int, width: int, number: Tensor) -> Tensor:
    """The convolution of maps (N, C, H, W) with a masked weight; height, width: of the output. number: see
    PLANNED."""
    output = _plan(number).forward(_maps(maps), weight.detach()).permute(3, 0, 1, 2)
    return output.new_empty(0).set_(output.untyped_storage(), 0, output.shape, output.stride())  # no view


@gather.register_fake
def _(maps: Tensor, weight: Tensor, height: int, width: int, number: Tensor) -> Tensor:
    return empty(maps, maps.shape[0], weight.shape[0], height, width)


@torch.library.custom_op("acdc::gather_input_gradient", mutates_args=())
def input_gradient(
    gradient: Tensor, weight: Tensor, channels: int, height: int, width: int, number: Tensor
) -> Tensor:
    return _plan(number).input_gradient(_maps(gradient), weight, height, width).permute(3, 0, 1, 2)


@input_gradient.register_fake
def _(gradient: Tensor, weight: Tensor, channels: int, height: int, width: int, number: Tensor) -> Tensor:
    return empty(gradient, gradient.shape[0], channels, height, width)


@torch.library.custom_op("acdc::gather_weight_gradient", mutates_args=())
def weight_gradient(maps: Tensor, gradient: Tensor, weight: Tensor, number: Tensor) -> Tensor:
    return _plan(number).weight_gradient(_maps(maps), _maps(gradient), weight)


@weight_gradient.register_fake
def _(maps: Tensor, gradient: Tensor, weight: Tensor, number: Tensor) -> Tensor:
    return torch.empty_like(weight)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, int, int, Tensor], output: Tensor) -> None:
    maps, weight, _, _, number = inputs
    ctx.save_for_backward(maps, weight, number)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    maps, weight, number = ctx.saved_tensors
    of_maps = of_weight = None
    if ctx.needs_input_grad[0]:
        of_maps = input_gradient(gradient, weight, *maps.shape[1:], number)
    if ctx.needs_input_grad[1]:
        of_weight = weight_gradient(maps, gradient, weight, number)
    return of_maps, of_weight, None, None, None


gather.register_autograd(_backward, setup_context=_save)


def _infer(
    maps: Tensor, other: Tensor | None, bias: Tensor | None, relu: bool, size: Sequence[int], number: Tensor
) -> Tensor:
    """relu(the convolution of maps (N, C, H, W) with a weight that stays + bias + other), without what is
    None or False. size: (channels, height, width) of the output, which `other` is like."""
    other = None if other is None else _maps(other)
    return _plan(number).infer(_maps(maps), other, bias, relu).permute(3, 0, 1, 2)


def _fake_infer(maps: Tensor, _: Any, bias: Any, relu: bool, size: Sequence[int], number: Tensor) -> Tensor:
    channels, height, width = size
    return empty(maps, maps.shape[0], channels, height, width)


def _refuse(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    raise RuntimeError("a model for inference has no gradients: run it under torch.no_grad()")


# Not by custom_op, whose own checks take 10 microseconds: with one image a layer takes hundreds
_SIGNATURE = "(Tensor maps, Tensor? other, Tensor? bias, bool relu, int[] size, Tensor number) -> Tensor"
torch.library.define("acdc::infer", _SIGNATURE)
torch.library.impl("acdc::infer", "CPU", _infer)
torch.library.register_fake("acdc::infer", _fake_infer)
torch.library.register_autograd("acdc::infer", _refuse)
infer = torch.ops.acdc.infer.default


def _infer_chain(maps: list[Tensor], number: int, digest: str) -> list[Tensor]:
    """What the chain of this number makes of its inputs (N, C, H, W). digest: of its layers, so that
    compiled code that is kept is not taken for that of another chain with its number."""
    found: list[Tensor] = CHAINS[number].compute(maps)
    return found


def _fake_infer_chain(maps: list[Tensor], number: int, digest: str) -> list[Tensor]:
    chain = CHAINS[number]
    shapes = chain.shapes([each.shape for each in maps])
    return [empty(maps[0], *shapes[value]) for value in chain.outputs]


torch.library.define("acdc::infer_chain", "(Tensor[] maps, int number, str digest) -> Tensor[]")
torch.library.impl("acdc::infer_chain", "CPU", _infer_chain)
torch.library.register_fake("acdc::infer_chain", _fake_infer_chain)
torch.library.register_autograd("acdc::infer_chain", _refuse)
infer_chain = torch.ops.acdc.infer_chain.default


@torch.library.custom_op("acdc::to_innermost", mutates_args=())
def to_innermost(maps: Tensor) -> Tensor:
    """(N, C, H, W) of any format, with its images innermost."""
    if is_innermost(maps):
        return maps.clone()
    output = empty(maps, *maps.shape)
    if not (maps.is_contiguous() or maps.is_contiguous(memory_format=torch.channels_last)):
        maps = maps.contiguous(memory_format=torch.channels_last)
    _transpose(maps, output, True)
    return output


@to_innermost.register_fake
def _(maps: Tensor) -> Tensor:
    return empty(maps, *maps.shape)


@torch.library.custom_op("acdc::from_innermost", mutates_args=())
def from_innermost(maps: Tensor, channels_last: bool) -> Tensor:
    """Back, to channels_last or to (N, C, H, W)."""
    output = torch.empty_like(maps, memory_format=_format(channels_last))
    if not is_innermost(maps):
        return output.copy_(maps)
    _transpose(output, maps, False)
    return output


@from_innermost.register_fake
def _(maps: Tensor, channels_last: bool) -> Tensor:
    return torch.empty_like(maps, memory_format=_format(channels_last))


def _format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def _transpose(maps: Tensor, innermost: Tensor, to: bool) -> None:
    images, channels, height, width = maps.shape
    sizes = (images, channels, height * width, maps.element_size())
    # Maps of one pixel are both: as channels_last they are copied in larger blocks
    channels_last = height * width == 1 or not maps.is_contiguous()
    library.run("transpose_maps", maps, innermost, *sizes, channels_last, to)


def _save_format(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.channels_last = not inputs[0].is_contiguous()


to_innermost.register_autograd(
    lambda ctx, gradient: from_innermost(gradient, ctx.channels_last), setup_context=_save_format
)
from_innermost.register_autograd(lambda ctx, gradient: (to_innermost(gradient), None))
