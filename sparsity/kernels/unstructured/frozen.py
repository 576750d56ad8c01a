"""What one layer of a finished model runs: weights read once, and vectors filled whatever the number of
images."""

from __future__ import annotations

import ctypes
import threading
import weakref
from typing import Any

import torch
from torch import Tensor

from sparsity.kernels.interface import KernelUnavailableError
from sparsity.kernels.unstructured import library
from sparsity.kernels.unstructured.plan import PAST_CACHES, Convolution, Tile

FULL = 0.7  # share of lanes with images in them, below which lanes are pixels
SLAB = 400_000  # bytes, where they are
RUNS = ((14, 42), (7, 14), (4, 0))  # units of a tile, from how many units of a map on
SIZES = 8  # of maps that a plan is laid out for at a time, beside the one with images in the lanes


class _Layer:
    """Of the C++ library, which has it back when nobody uses it any more."""

    def __init__(self, native: ctypes.CDLL, pointer: int) -> None:
        self.pointer = pointer
        weakref.finalize(self, native.layer_free, pointer)


class FrozenPlan:
    """Of one layer and its weight (outputs, inputs / groups, *kernel), or (outputs, inputs), dropped weights
    0.

    Where there are too few images to fill vectors with, as one, and the kernel is larger than 1 x 1, vectors
    are filled with pixels: laid out for each size of maps at its first use, and kept for the SIZES used last.
    Threads may share a plan. Raises KernelUnavailableError.
    """

    def __init__(self, convolution: Convolution, weight: Tensor, tile: Tile, dtype: torch.dtype) -> None:
        self.convolution, self.dtype = convolution, dtype
        self._weight, self._mask = weight.detach().contiguous(), (weight.detach() != 0).contiguous()
        self.outputs, self.inputs = int(weight.shape[0]), int(weight.shape[1]) * convolution.groups
        self._library, self._lock = library.load(), threading.Lock()
        self._filled_with_images = self._layer(0, 0, tile)
        self._filled_with_pixels: dict[tuple[int, int], _Layer] = {}  # by images and width, oldest first

    def forward(self, maps: Tensor, weight: Tensor) -> Tensor:
        """maps: (inputs, H, W, N). Returns (outputs, H', W', N). weight: not looked at."""
        size = self.convolution.size(maps.shape[1:])
        output = maps.new_empty(self.outputs, size.out_height, size.out_width, size.images)
        layer = self._layer_for(size)  # held until the product is done: another thread may displace it
        status = self._library.layer_forward(
            layer.pointer,
            ctypes.byref(size),
            maps.data_ptr(),
            None,
            output.data_ptr(),
            output.nbytes >= PAST_CACHES,
            torch.get_num_threads(),
        )
        assert status == 0
        return output

    def input_gradient(self, *operands: Any) -> Tensor:
        """Refused, and so is weight_gradient."""
        raise RuntimeError("a model for inference has no gradients: run it under torch.no_grad()")

    weight_gradient = input_gradient

    def _layer_for(self, size: library.Size) -> _Layer:
        lanes = library.vector_bytes() // self.dtype.itemsize
        full = size.images / (-(-size.images // lanes) * lanes) if size.images else 1.0
        if full >= FULL or self.convolution.is_flat:
            return self._filled_with_images
        key = (size.images, size.out_width)
        with self._lock:
            layer = self._filled_with_pixels.pop(key, None)
            if layer is None:
                units = -(-size.out_height * size.out_width * size.images // lanes)
                known = ((run, least) for run, least in RUNS if self._library.has_tile(1, run))
                run = next(run for run, least in known if units >= least)
                layer = self._layer(*key, Tile(1, run, 1, SLAB))
            self._filled_with_pixels[key] = layer
            if len(self._filled_with_pixels) > SIZES:
                del self._filled_with_pixels[next(iter(self._filled_with_pixels))]
        return layer

    def _layer(self, images: int, width: int, tile: Tile) -> _Layer:
        if not self._library.has_tile(tile.rows, tile.columns * tile.units):
            raise KernelUnavailableError(f"no code for the tile {tile} with the instructions of this machine")
        geometry = self.convolution.geometry(self.outputs, self.inputs, tuple(self._weight.stride()))
        operands = (ctypes.byref(geometry), self._mask.data_ptr(), ctypes.byref(library.Tile(*tile)))
        pointer: int | None = self._library.layer_new_forward(
            *operands, self.dtype == torch.bfloat16, images, width
        )
        if pointer is None:
            raise KernelUnavailableError("the kernel spans too many pixels")
        self._library.layer_freeze(pointer, self._weight.data_ptr(), torch.get_num_threads())
        return _Layer(self._library, pointer)
