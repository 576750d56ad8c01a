"""What one layer of a finished model runs: weights read once, and vectors filled whatever the number of
images."""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsity.kernels.interface import KernelUnavailableError
from sparsity.kernels.unstructured import library, operator
from sparsity.kernels.unstructured.kernel import SparseKernel
from sparsity.kernels.unstructured.plan import PAST_CACHES, Convolution, Tile

FULL = 0.7  # share of lanes with images in them, below which lanes are pixels
SIZES = 8  # of maps that a plan is laid out for at a time


def lanes_are_pixels(convolution: Convolution, images: int, dtype: torch.dtype) -> bool:
    """Whether there are too few images to fill vectors with, as one, and the kernel is larger than 1 x 1."""
    lanes = library.vector_bytes() // dtype.itemsize
    return not convolution.is_flat and images < FULL * lanes * -(-images // lanes)


class _Layer:
    """Of the C++ library, which has it back when nobody uses it any more."""

    def __init__(self, native: ctypes.CDLL, pointer: int) -> None:
        self.pointer = pointer
        weakref.finalize(self, native.layer_free, pointer)


class FrozenPlan:
    """Of one layer and its weight (outputs, inputs / groups, *kernel), or (outputs, inputs), dropped weights
    0.

    Where lanes are pixels, the plan is laid out for each size of maps at its first use, and kept for the
    SIZES met last; the tile is as many units of one row then. Threads may share a plan. Raises
    KernelUnavailableError.
    """

    def __init__(self, convolution: Convolution, weight: Tensor, tile: Tile, dtype: torch.dtype) -> None:
        self.convolution, self.tile, self.dtype = convolution, tile, dtype
        self._weight, self._mask = weight.detach().contiguous(), (weight.detach() != 0).contiguous()
        self.outputs, self.inputs = int(weight.shape[0]), int(weight.shape[1]) * convolution.groups
        self._library, self._lock = library.load(), threading.Lock()
        self._filled_with_images = self._layer(0, 0, 0, tile)
        self._known: dict[torch.Size, tuple[library.Size, _Layer]] = {}  # by (H, W, N), oldest first

    def infer(self, maps: Tensor, other: Tensor | None, bias: Tensor | None, relu: bool) -> Tensor:
        """maps: (inputs, H, W, N). other: (outputs, H', W', N), and so is what is returned; see
        operator.infer."""
        size, layer = self.laid_out(maps.shape[1:])
        output = maps.new_empty(self.outputs, size.out_height, size.out_width, size.images)
        epilogue = library.Epilogue(
            *(None if each is None else each.data_ptr() for each in (bias, other)), relu
        )
        given = epilogue if relu or bias is not None or other is not None else None
        past_caches = output.nbytes >= PAST_CACHES
        library.run("layer_infer", layer.pointer, size, maps, given, output, past_caches)
        return output

    def laid_out(self, of: Sequence[int]) -> tuple[library.Size, _Layer]:
        """What computes maps of this size (H, W, N)."""
        of = torch.Size(of)
        return self._known.get(of) or self._learn(of)

    def _learn(self, of: torch.Size) -> tuple[library.Size, _Layer]:
        size = self.convolution.size(of)
        found = size, self._layer_for(size)
        with self._lock:  # threads that use a layer hold it until their products are done
            if len(self._known) >= SIZES:
                del self._known[next(iter(self._known))]
            self._known[of] = found
        return found

    def _layer_for(self, size: library.Size) -> _Layer:
        if not lanes_are_pixels(self.convolution, size.images, self.dtype):
            return self._filled_with_images
        run = self.tile.rows * self.tile.columns * self.tile.units
        widths = size.in_width, size.out_width
        return self._layer(size.images, *widths, Tile(1, run, 1, self.tile.slab_bytes))

    def _layer(self, images: int, in_width: int, out_width: int, tile: Tile) -> _Layer:
        if not self._library.has_tile(tile.rows, tile.columns * tile.units):
            raise KernelUnavailableError(f"no code for the tile {tile} with the instructions of this machine")
        geometry = self.convolution.geometry(self.outputs, self.inputs, tuple(self._weight.stride()))
        operands = (ctypes.byref(geometry), self._mask.data_ptr(), ctypes.byref(library.Tile(*tile)))
        pointer: int | None = self._library.layer_new_forward(
            *operands, self.dtype == torch.bfloat16, images, in_width, out_width
        )
        if pointer is None:
            raise KernelUnavailableError("the kernel spans too many pixels")
        library.run("layer_freeze", pointer, self._weight)
        return _Layer(self._library, pointer)


class FrozenKernel(SparseKernel):
    """Of one layer of a finished model: what stands behind it is computed within."""

    def __reduce__(self) -> Any:
        return FrozenKernel, (self.tiles, self.dtype)

    def prepare(self, layer: Any) -> None:
        self.plan = FrozenPlan(Convolution.of(layer), layer.weight, self.tiles.forward, self.dtype)

    def __call__(self, layer: Any, input: Tensor, other: Any = None, relu: bool = False) -> Tensor:
        """relu(layer(input) + other)."""
        maps = self.maps_of(layer, input)
        if maps is None:
            return _behind(layer.dense(input), other, relu)
        size = (len(layer.weight), *Convolution.of(layer).output_size(*maps.shape[2:]))
        of_maps = isinstance(other, Tensor)  # in a model's graph it may be a number
        within = other is None or (
            of_maps and other.shape == (len(maps), *size) and other.dtype == maps.dtype
        )
        given = other if within else None
        output = operator.infer(maps, given, layer.bias, relu and within, size, self.number)
        if isinstance(layer, nn.Linear):
            output = output.reshape(*input.shape[:-1], len(layer.weight))
        return output if within else _behind(output, other, relu)


def _behind(output: Tensor, other: Any, relu: bool) -> Tensor:
    output = output if other is None else output + other
    return output.relu() if relu else output
