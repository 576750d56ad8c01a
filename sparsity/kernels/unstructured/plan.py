"""What one layer runs: its kept weights laid out for tiles, in memory of the C++ library."""

from __future__ import annotations

import ctypes
import math
import threading
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparsity.kernels.interface import KernelUnavailableError
from sparsity.kernels.unstructured import library

PAST_CACHES = 4 << 20  # bytes of an output from which on it is written past the caches


class Tile(NamedTuple):
    """rows x columns output pixels of `units` vectors of images, over blocks of input channels that take at
    most slab_bytes; see native/plan.h."""

    rows: int
    columns: int
    units: int
    slab_bytes: int


class Tiles(NamedTuple):
    """Of a layer's three products."""

    forward: Tile
    input_gradient: Tile
    weight_gradient: Tile


class Convolution(NamedTuple):
    """What a layer does with maps, besides its weight. A linear layer is one of 1 x 1."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    @classmethod
    def of(cls, layer: nn.Conv2d | nn.Linear) -> Convolution:
        if isinstance(layer, nn.Linear):
            return cls((1, 1), (1, 1), (0, 0), (1, 1), 1)
        kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
        if layer.padding == "valid":
            padding: Any = (0, 0)
        elif layer.padding == "same":
            padding = tuple(d * (k - 1) // 2 for d, k in zip(dilation, kernel, strict=True))
        else:
            padding = layer.padding
        return cls(kernel, stride, padding, dilation, layer.groups)  # type: ignore[arg-type]

    @staticmethod
    def reason_unsupported(layer: nn.Conv2d | nn.Linear) -> str | None:
        """Why no plan computes what the layer does; None where one does."""
        if isinstance(layer, nn.Conv2d) and layer.padding_mode != "zeros":
            return f"padding mode {layer.padding_mode}"
        if isinstance(layer, nn.Conv2d) and layer.padding == "same":
            steps = zip(layer.dilation, layer.kernel_size, strict=True)
            if any(dilation * (size - 1) % 2 for dilation, size in steps):
                return "uneven padding"
        if layer.weight.dtype != torch.float32:
            return f"weights are {layer.weight.dtype}"
        return None if layer.weight.device.type == "cpu" else f"on {layer.weight.device}, not a CPU"

    @property
    def is_flat(self) -> bool:
        """Whether pixels do not matter: a product of matrices."""
        return self[:3] == ((1, 1), (1, 1), (0, 0))

    def geometry(self, outputs: int, inputs: int, strides: tuple[int, ...]) -> library.Geometry:
        """For the library. strides: of the weight."""
        pairs = (*self.stride, *self.padding, *self.dilation)
        filled = (ctypes.c_int64 * 4)(*strides, *(1,) * (4 - len(strides)))
        return library.Geometry(outputs, inputs, self.groups, *self.kernel, *pairs, filled)

    def size(self, maps: Sequence[int]) -> library.Size:
        """For the library. maps: height, width and images of the input."""
        height, width, images = maps
        return library.Size(images, height, width, *self.output_size(height, width))

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        sizes = zip((height, width), *self[:4], strict=True)
        height, width = ((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in sizes)
        return height, width

    def reaches(self, images: int, height: int, width: int) -> bool:
        """Whether offsets of 32 bits reach all of a channel's maps, input and output, and there is output."""
        output = self.output_size(height, width)
        return min(output) > 0 and 4 * images * max(height * width, math.prod(output)) < 2**31


class Plan:
    """Of one layer, for one mask. weight: (outputs, inputs / groups, *kernel), or (outputs, inputs); its
    strides count, not its values, which are read at each product. Products do not depend on the number of
    threads.

    Activations are in `dtype`, with their images innermost: (channels, height, width, images), without
    gaps."""

    def __init__(
        self,
        convolution: Convolution,
        mask: Tensor,
        strides: tuple[int, ...],
        tiles: Tiles,
        dtype: torch.dtype,
    ) -> None:
        self.convolution, self.tiles, self.dtype, self.strides = convolution, tiles, dtype, strides
        outputs, inputs = mask.shape[:2]
        self.outputs, self.inputs = int(outputs), int(inputs) * convolution.groups
        self._library, self._lock = library.load(), threading.Lock()
        geometry = convolution.geometry(self.outputs, self.inputs, strides)
        if not all(self._library.has_tile(tile.rows, tile.columns * tile.units) for tile in tiles):
            raise KernelUnavailableError(
                f"no code for the tiles {tiles} with the instructions of this machine"
            )
        mask = mask.contiguous()
        tile_array = (library.Tile * 3)(*(library.Tile(*tile) for tile in tiles))
        self._layer = self._library.layer_new(
            ctypes.byref(geometry), mask.data_ptr(), ctypes.byref(tile_array), dtype == torch.bfloat16
        )
        if self._layer is None:
            raise KernelUnavailableError("the kernel spans too many pixels")
        weakref.finalize(self, self._library.layer_free, self._layer)

    def forward(self, maps: Tensor, weight: Tensor) -> Tensor:
        """maps: (inputs, H, W, N). Returns (outputs, H', W', N)."""
        size = self.convolution.size(maps.shape[1:])
        output = maps.new_empty(self.outputs, size.out_height, size.out_width, size.images)
        self._run("layer_forward", size, maps, weight, output)
        return output

    def input_gradient(self, gradient: Tensor, weight: Tensor, height: int, width: int) -> Tensor:
        """gradient: (outputs, H', W', N). Returns (inputs, height, width, N)."""
        size = self.convolution.size((height, width, gradient.shape[3]))
        output = gradient.new_empty(self.inputs, height, width, size.images)
        self._run("layer_input_gradient", size, gradient, weight, output)
        return output

    def weight_gradient(self, maps: Tensor, gradient: Tensor, weight: Tensor) -> Tensor:
        """As forward and input_gradient take them. Returns a tensor like weight: 0 where the mask drops."""
        like_weight = torch.empty_like(weight)
        as_planned = like_weight.stride() == self.strides
        output = like_weight if as_planned else torch.empty_strided(weight.shape, self.strides)
        size = self.convolution.size(maps.shape[1:])
        library.run("layer_weight_gradient", self._layer, size, maps, gradient, output)
        return output if as_planned else like_weight.copy_(output)

    def _run(self, product: str, size: library.Size, source: Tensor, weight: Tensor, output: Tensor) -> None:
        past_caches = output.numel() * output.element_size() >= PAST_CACHES
        weight = self._as_planned(weight)  # held until the product is done
        with self._lock:  # the plan keeps the weights of a product; copies of a layer share it
            library.run(product, self._layer, size, source, weight, output, past_caches)

    def _as_planned(self, weight: Tensor) -> Tensor:
        """With the strides that the plan was made for."""
        if weight.stride() == self.strides:
            return weight
        return torch.empty_strided(weight.shape, self.strides, dtype=weight.dtype).copy_(weight)
