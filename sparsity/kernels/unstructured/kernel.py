"""The kernel of one layer on a CPU, with any mask: forward, input gradient and weight gradient skip what is
dropped."""

from __future__ import annotations

import itertools
import re
from typing import Any

import torch
from torch import Tensor, nn

from sparsity.kernels.interface import Kernel, KernelUnavailableError
from sparsity.kernels.unstructured import operator
from sparsity.kernels.unstructured.plan import Convolution, Plan, Tile, Tiles

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

_numbers = itertools.count()


class SparseKernel(Kernel):
    """tiles: how it computes, see plan.Tile; results differ between them only by rounding. dtype: of
    activations, autocast's or float32; weights and sums are float32, weights are rounded to dtype before they
    multiply."""

    sparse_products = 3

    def __init__(self, tiles: Tiles, dtype: torch.dtype) -> None:
        self.tiles, self.dtype = tiles, dtype
        precision = next(name for name, known in DTYPES.items() if known == dtype)
        self.name = f"sparse {precision} " + " ".join(map(_as_text, tiles))
        self.plan: Any = None  # a Plan, once there is a mask
        number = next(_numbers)  # stands for the kernel in compiled code
        operator.PLANNED[number] = self
        self.number = torch.tensor(number, device="cpu")

    @property
    def title(self) -> str:
        return " ".join(self.name.split(" ")[:2])

    def __deepcopy__(self, memo: Any) -> SparseKernel:
        """Of a copied layer, whose mask may become another."""
        copied = type(self)(self.tiles, self.dtype)
        copied.plan = self.plan
        return copied

    def __reduce__(self) -> Any:
        return from_name, (self.name,)  # without its plan

    def of(self, layer: nn.Module) -> SparseKernel:
        return SparseKernel(self.tiles, self.dtype)

    def prepare(self, layer: Any) -> None:
        if (reason := Convolution.reason_unsupported(layer)) is not None:
            raise KernelUnavailableError(reason)
        strides = torch.empty_like(layer.weight).stride()  # a weight with gaps has a gradient without
        self.plan = Plan(Convolution.of(layer), layer.mask, strides, self.tiles, self.dtype)

    def __call__(self, layer: Any, input: Tensor) -> Tensor:
        """An input that there is no plan for goes to the dense product, which computes or refuses it."""
        maps = self.maps_of(layer, input)
        if maps is None:
            return layer.dense(input)
        size = Convolution.of(layer).output_size(*maps.shape[2:])
        output = operator.gather(maps, layer.weight, *size, self.number)
        if layer.bias is not None:
            output = output + layer.bias.to(output.dtype)[:, None, None]
        return (
            output.reshape(*input.shape[:-1], len(layer.weight)) if isinstance(layer, nn.Linear) else output
        )

    def maps_of(self, layer: Any, input: Tensor) -> Tensor | None:
        """(images, channels, height, width), as autocast makes them and with images innermost; None where the
        plan is not for them."""
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else input.dtype
        known = input.dtype in DTYPES.values() and layer.weight.dtype == torch.float32
        if self.plan is None or dtype != self.dtype or not known or input.device.type != "cpu":
            return None
        if isinstance(layer, nn.Linear):
            if input.dim() < 2 or input.shape[-1] != layer.in_features:
                return None
            maps = input.flatten(0, -2)[:, :, None, None]
        else:
            if input.dim() != 4 or input.shape[1] != layer.in_channels:
                return None
            maps = input
        images, _, height, width = maps.shape
        if not Convolution.of(layer).reaches(images, height, width):
            return None
        return operator.as_innermost(maps.to(dtype))


class DenseInnermost(Kernel):
    """The dense product between layers on sparse kernels: it changes the memory format of its maps itself, so
    that theirs goes on behind it."""

    name = title = "dense innermost"
    sparse_products = 0

    def __call__(self, layer: Any, input: Tensor) -> Tensor:
        if input.dim() != 4 or input.device.type != "cpu":
            return layer.dense(input)
        return operator.to_innermost(layer.dense(operator.from_innermost(input, True)))


DENSE_INNERMOST = DenseInnermost()


def _as_text(tile: Tile) -> str:
    return f"{tile.rows}x{tile.columns}x{tile.units}/{tile.slab_bytes}"


def from_name(name: str) -> SparseKernel | DenseInnermost | None:
    """The kernel that has this name, for one layer; None for a name of another kind."""
    if name == DENSE_INNERMOST.name:
        return DENSE_INNERMOST
    words = name.split(" ")
    if len(words) != 5 or words[0] != "sparse" or words[1] not in DTYPES:
        return None
    numbers = [re.fullmatch(r"(\d+)x(\d+)x(\d+)/(\d+)", word) for word in words[2:]]
    if not all(numbers):
        return None
    tiles = Tiles(*(Tile(*map(int, match.groups())) for match in numbers if match))
    return SparseKernel(tiles, DTYPES[words[1]])
