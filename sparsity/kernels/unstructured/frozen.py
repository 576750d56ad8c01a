"""What one layer of a finished model runs: weights read once, and vectors filled whatever the number of
images."""

from __future__ import annotations

import ctypes
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


class FrozenPlan:
    """Of one layer and its weight (outputs, inputs / groups, *kernel), or (outputs, inputs), dropped weights
    0.

    Where there are too few images to fill vectors with, as one, and the kernel is larger than 1 x 1, vectors
    are filled with pixels: laid out for each size of maps at its first use. Raises KernelUnavailableError.
    """

    def __init__(self, convolution: Convolution, weight: Tensor, tile: Tile, dtype: torch.dtype) -> None:
        self.convolution, self.dtype = convolution, dtype
        self._weight, self._mask = weight.detach().contiguous(), (weight.detach() != 0).contiguous()
        self.outputs, self.inputs = int(weight.shape[0]), int(weight.shape[1]) * convolution.groups
        self._library = library.load()
        self._layers: dict[tuple[int, int], int] = {}  # by images and output width; 0: lanes are images
        self._layer(0, 0, tile)

    def forward(self, maps: Tensor, weight: Tensor) -> Tensor:
        """maps: (inputs, H, W, N). Returns (outputs, H', W', N). weight: not looked at."""
        size = self.convolution.size(maps.shape[1:])
        output = maps.new_empty(self.outputs, size.out_height, size.out_width, size.images)
        status = self._library.layer_forward(
            self._layer_for(size),
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

    def _layer_for(self, size: library.Size) -> int:
        lanes = library.vector_bytes() // self.dtype.itemsize
        full = size.images / (-(-size.images // lanes) * lanes) if size.images else 1.0
        if full >= FULL or self.convolution.is_flat:
            return self._layers[0, 0]
        if (found := self._layers.get((size.images, size.out_width))) is not None:
            return found
        units = -(-size.out_height * size.out_width * size.images // lanes)
        known = ((run, least) for run, least in RUNS if self._library.has_tile(1, run))
        run = next(run for run, least in known if units >= least)
        return self._layer(size.images, size.out_width, Tile(1, run, 1, SLAB))

    def _layer(self, images: int, width: int, tile: Tile) -> int:
        if not self._library.has_tile(tile.rows, tile.columns * tile.units):
            raise KernelUnavailableError(f"no code for the tile {tile} with the instructions of this machine")
        geometry = self.convolution.geometry(self.outputs, self.inputs, tuple(self._weight.stride()))
        operands = (ctypes.byref(geometry), self._mask.data_ptr(), ctypes.byref(library.Tile(*tile)))
        layer: int | None = self._library.layer_new_forward(
            *operands, self.dtype == torch.bfloat16, images, width
        )
        if layer is None:
            raise KernelUnavailableError("the kernel spans too many pixels")
        weakref.finalize(self, self._library.layer_free, layer)
        self._library.layer_freeze(layer, self._weight.data_ptr(), torch.get_num_threads())
        self._layers[images, width] = layer
        return layer
