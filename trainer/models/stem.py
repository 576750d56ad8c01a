"""What a network does first, in a form that should suit a GPU: the convolution of images and max pooling.

Both see the largest maps, and take 4 of a ResNet50 step's 37 ms on an H200, where reading and writing what
they have to takes 1. The graph that torch.compile makes is changed, not the model: layers, masks and
checkpoints know nothing of it, and results differ by rounding alone. It has not run on a GPU yet, so recipes
ask for it (engine.fast_stem).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from sparsity.kernels.unstructured.graphs import max_pool_window

CHANNELS = 4  # of images at most; a tensor core takes 8 or more at a time
ALIGNMENT = 8
_CONVOLUTIONS = (functional.conv2d, torch.conv2d)


def inductor(graph: fx.GraphModule, inputs: list[Any], **options: Any) -> Callable[..., Any]:
    """A backend of torch.compile: Inductor, for the changed graph."""
    rewrite(graph)
    compiled: Callable[..., Any] = torch._dynamo.lookup_backend("inductor")(graph, inputs, **options)
    return compiled


def rewrite(graph: fx.GraphModule) -> int:
    """Change the graph, which Dynamo made, in place; how many operators were replaced."""
    replaced = 0
    for node in list(graph.graph.nodes):
        with graph.graph.inserting_before(node):
            if _is_stem(node):
                padding = node.args[4][0]
                new = graph.graph.call_function(conv_by_depth, (*node.args[:3], padding))
            elif max_pool_window(node) == ((3, 3), (2, 2), (1, 1)) and _is_even(node.args[0], floating=True):
                new = graph.graph.call_function(max_pool, (node.args[0],))
            else:
                continue
        new.meta.update(node.meta)
        node.replace_all_uses_with(new)
        graph.graph.erase_node(node)
        replaced += 1
    if replaced:
        graph.graph.lint()
        graph.recompile()
    return replaced


def _is_stem(node: fx.Node) -> bool:
    """Whether it is a convolution of images by which their sides are halved: stride 2, "same" padding."""
    if node.target not in _CONVOLUTIONS or node.kwargs or len(node.args) != 7:
        return False
    input, weight, _, stride, padding, dilation, groups = node.args
    if (stride, dilation, groups) != ((2, 2), (1, 1), 1) or not _is_even(input):
        return False
    _, channels, height, width = weight.meta["example_value"].shape  # type: ignore[union-attr]
    half = height // 2
    return channels <= CHANNELS and height == width and height % 4 == 3 and padding == (half, half)


def _is_even(node: Any, floating: bool = False) -> bool:
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    if not isinstance(value, Tensor) or value.dim() != 4 or (floating and not value.is_floating_point()):
        return False
    return value.shape[2] % 2 == 0 and value.shape[3] % 2 == 0


def conv_by_depth(input: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
    """conv2d(input, weight, bias, stride=2, padding=padding) of few channels, as a convolution of stride 1
    over a quarter of the places with four times the channels, filled up with zeros to a multiple of
    ALIGNMENT.

    input: (N, C, H, W), H and W even. weight: (O, C, k, k), k = 2 * padding + 1, of which 4 divides k + 1.
    Returns (N, O, H / 2, W / 2).
    """
    images, channels, height, width = input.shape
    outputs, _, size, _ = weight.shape
    fill = -4 * channels % ALIGNMENT
    blocks = input.view(images, channels, height // 2, 2, width // 2, 2).permute(0, 3, 5, 1, 2, 4)
    blocks = blocks.reshape(images, 4 * channels, height // 2, width // 2)
    # output i reads places 2 i - padding to 2 i + padding, and one more before with a weight of 0: whole
    # blocks, from i - (padding + 1) / 2 on
    before, after = (padding + 1) // 2, (padding - 1) // 2
    blocks = functional.pad(blocks, (before, after, before, after, 0, fill))
    taps = functional.pad(weight, (1, 0, 1, 0)).view(
        outputs, channels, (size + 1) // 2, 2, (size + 1) // 2, 2
    )
    taps = taps.permute(0, 3, 5, 1, 2, 4).reshape(outputs, 4 * channels, (size + 1) // 2, (size + 1) // 2)
    taps = functional.pad(taps, (0, 0, 0, 0, 0, fill))
    return functional.conv2d(
        blocks.contiguous(memory_format=torch.channels_last),
        taps.contiguous(memory_format=torch.channels_last),
        bias,
    )


def max_pool(input: Tensor) -> Tensor:
    """max_pool2d(input, 3, 2, 1) of (N, C, H, W), H and W even."""
    output: Tensor = _MaxPool.apply(input)  # type: ignore[no-untyped-call]
    return output


class _MaxPool(torch.autograd.Function):
    """A window's greatest place is kept as one of 9. Going back, blocks of 2 x 2 places gather from the four
    windows that meet there, each once; Inductor's own form gathers from four for every place."""

    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        height, width = input.shape[2] // 2, input.shape[3] // 2
        padded = functional.pad(input, (1, 0, 1, 0), value=-torch.inf)
        best = padded[:, :, 0 : 2 * height : 2, 0 : 2 * width : 2]
        place = torch.zeros_like(best, dtype=torch.int8)
        for number in range(1, 9):
            top, left = divmod(number, 3)
            other = padded[:, :, top : top + 2 * height - 1 : 2, left : left + 2 * width - 1 : 2]
            better = (other > best) | other.isnan()
            best = torch.where(better, other, best)
            place = torch.where(better, number, place)
        ctx.save_for_backward(place.to(torch.int8))
        return best

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (place,) = ctx.saved_tensors
        gradient: Tensor = stem_pool_gradient(*grads, place)
        return gradient


@torch.library.custom_op("acdc::stem_pool_gradient", mutates_args=())
def stem_pool_gradient(grad: Tensor, place: Tensor) -> Tensor:
    """grad, place: (N, C, H, W), of each window's output and which of its 9 places, int8, is the greatest.
    Returns (N, C, 2 H, 2 W)."""
    images, channels, height, width = grad.shape
    grad = functional.pad(grad, (0, 1, 0, 1))
    place = functional.pad(place, (0, 1, 0, 1), value=-1)

    def share(down: int, right: int, number: int) -> Tensor:
        here = (slice(None), slice(None), slice(down, height + down), slice(right, width + right))
        return torch.where(place[here] == number, grad[here], 0)

    corners = (
        share(0, 0, 4),
        share(0, 0, 5) + share(0, 1, 3),
        share(0, 0, 7) + share(1, 0, 1),
        share(0, 0, 8) + share(0, 1, 6) + share(1, 0, 2) + share(1, 1, 0),
    )
    blocks = torch.stack(corners, -1).view(images, channels, height, width, 2, 2)
    whole = blocks.permute(0, 1, 2, 4, 3, 5).reshape(images, channels, 2 * height, 2 * width)
    return whole.contiguous(memory_format=torch.channels_last)


@stem_pool_gradient.register_kernel("cuda")
def _(grad: Tensor, place: Tensor) -> Tensor:
    from trainer.models import pool_kernel

    return pool_kernel.max_pool_gradient(grad, place)


@stem_pool_gradient.register_fake
def _(grad: Tensor, place: Tensor) -> Tensor:
    images, channels, height, width = grad.shape
    whole = grad.new_empty((images, channels, 2 * height, 2 * width))
    return whole.contiguous(memory_format=torch.channels_last)
