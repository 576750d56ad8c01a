"""How sparse kernels are measured and chosen: tiles by the time they take, and sparse against dense by the
sum."""

from __future__ import annotations

import itertools
import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsity.flops import Call
from sparsity.kernels.interface import Kernel
from sparsity.kernels.measure import Measured, Timing, relative_error
from sparsity.kernels.unstructured import operator
from sparsity.kernels.unstructured.frozen import FrozenKernel, FrozenPlan, lanes_are_pixels
from sparsity.kernels.unstructured.kernel import DENSE_INNERMOST, SparseKernel, from_name
from sparsity.kernels.unstructured.library import instructions, sources_digest, vector_bytes
from sparsity.kernels.unstructured.plan import Convolution, Plan, Tile, Tiles


class Shape(NamedTuple):
    """Of a layer in a step on one device: what its times depend on. percent: of weights kept."""

    images: int
    inputs: int
    outputs: int
    kernel_y: int
    kernel_x: int
    stride_y: int
    stride_x: int
    padding_y: int
    padding_x: int
    dilation_y: int
    dilation_x: int
    groups: int
    height: int
    width: int
    percent: int

    def __str__(self) -> str:
        kernel = f"{self.kernel_y}x{self.kernel_x}" + f"/{self.stride_y}" * (self.stride_y > 1)
        groups = f" in {self.groups} groups" * (self.groups > 1)
        maps = f"{self.images} x {self.height}x{self.width}"
        return f"{kernel} {self.inputs:,} to {self.outputs:,}{groups}, {maps}, {self.percent} % kept"

    @property
    def convolution(self) -> Convolution:
        kernel, stride, padding, dilation = ((self[i], self[i + 1]) for i in (3, 5, 7, 9))
        return Convolution(kernel, stride, padding, dilation, self.groups)


@dataclass(frozen=True)
class SparseFamily:
    """See sparsity.kernels.interface. inference: the forward product alone, with weights that stay."""

    dtype: torch.dtype
    inference: bool = False

    @property
    def key(self) -> str:
        flags = " ".join(instructions()) or platform.machine()
        machine = f"CPU {_cpu_name()}, {flags}, {torch.get_num_threads()} threads"
        products = "inference" if self.inference else "training"
        versions = f"torch {torch.__version__}, kernels {sources_digest()}"
        return f"{machine}, {versions}, {self.dtype}, {products}"

    between = DENSE_INNERMOST

    def has(self, kernel: Kernel) -> bool:
        return kernel is self.between or (isinstance(kernel, SparseKernel) and kernel.dtype == self.dtype)

    def shape(self, layer: Any, calls: Sequence[Call], images: int) -> Shape | str:
        if (reason := Convolution.reason_unsupported(layer)) is not None:
            return reason
        greatest = max(calls, key=lambda call: call.outputs)
        if isinstance(layer, nn.Linear):
            height, width, images = 1, 1, images * greatest.width
        else:
            height, width = greatest.height, greatest.width
        convolution = Convolution.of(layer)
        if not convolution.reaches(images, height, width):
            return "images are too large"
        inputs, outputs = layer.weight.shape[1] * convolution.groups, layer.weight.shape[0]
        kept = layer.weight.detach() != 0 if self.inference else layer.mask
        percent = _round(100 * kept.float().mean().item())
        pairs = itertools.chain(*convolution[:4])  # of kernel, stride, padding, dilation
        return Shape._make((images, inputs, outputs, *pairs, convolution.groups, height, width, percent))

    def measure(self, shape: Shape) -> Measured:
        return _Trial(shape, self.dtype, self.inference).run()

    @staticmethod
    def choose(measured: Measured, required: bool = False) -> Kernel | None:
        """Sparse where all three products are right and faster together; within a region of sparse layers,
        see choose.best_region, a little slower is still a gain."""
        if not all(timing.right for timing in measured.timings):
            return None
        dense = sum(timing.dense for timing in measured.timings)
        sparse = sum(timing.sparse or 0.0 for timing in measured.timings)
        return from_name(measured.kernel) if required or sparse < dense + measured.conversion else None


def _round(percent: float) -> int:
    """To one of few numbers: layers whose densities differ less are measured as one."""
    steps = (1, 2, 3, 4, 5, 7, 10, 14, 20, 28, 40, 56, 75, 100)
    return min(steps, key=lambda step: abs(step - percent) / step)


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            lines = [
                line for line in file if line.startswith(("model name", "cpu family", "model\t", "CPU part"))
            ]
    except OSError:
        return platform.processor()
    return ", ".join(dict.fromkeys(line.partition(":")[2].strip() for line in lines))


class _Trial:
    """One shape's operands, with random weights and a random mask, and the three products of both kinds."""

    def __init__(self, shape: Shape, dtype: torch.dtype, inference: bool) -> None:
        self.shape, self.dtype, self.convolution = shape, dtype, shape.convolution
        self.inference = inference
        random = torch.Generator().manual_seed(0)
        size = (shape.outputs, shape.inputs // shape.groups, *self.convolution.kernel)
        self.mask = torch.rand(size, generator=random) < shape.percent / 100
        self.weight = torch.randn(size, generator=random) * self.mask
        self.dense_weight = self.weight.to(dtype).contiguous(memory_format=torch.channels_last)
        noise = torch.randn(_NOISE, generator=random).to(dtype)
        height, width = self.convolution.output_size(shape.height, shape.width)
        self.dense_maps = _fill(noise, (shape.images, shape.inputs, shape.height, shape.width))
        self.dense_gradient = _fill(noise, (shape.images, shape.outputs, height, width))
        self.maps = operator.to_innermost(self.dense_maps)
        self.gradient = operator.to_innermost(self.dense_gradient)

    def run(self) -> Measured:
        """Products are those of the operators, whose own cost is part of it."""
        tiles = candidates(self.shape, self.dtype, self.inference)
        kernels = [self._kernel(tile) for tile in tiles]
        acdc, weight, shape = torch.ops.acdc, self.weight, self.shape
        size = self.convolution.output_size(shape.height, shape.width)
        products: list[tuple[Callable[[], Tensor], Callable[[Any], Tensor]]]
        if self.inference:
            whole = (shape.outputs, *size)
            products = [
                (self._dense_frozen(), lambda of: acdc.infer(self.maps, None, None, False, whole, of.number))
            ]
        else:
            inputs = (shape.inputs, shape.height, shape.width)
            products = [
                (self._dense_forward, lambda of: acdc.gather(self.maps, weight, *size, of.number)),
                (
                    lambda: self._dense_backward(0),
                    lambda of: acdc.gather_input_gradient(self.gradient, weight, *inputs, of.number),
                ),
                (
                    lambda: self._dense_backward(1) * self.mask,
                    lambda of: acdc.gather_weight_gradient(self.maps, self.gradient, weight, of.number),
                ),
            ]
        timings, best = zip(*(_fastest(dense, sparse, kernels) for dense, sparse in products), strict=True)
        chosen = [tiles[index] for index in best] * (3 if self.inference else 1)
        name = SparseKernel(Tiles(*chosen), self.dtype).name
        forward, gradient, weight_gradient = (*timings, None, None)[:3]
        return Measured(forward, gradient, weight_gradient, self._conversion(), name)

    def _kernel(self, tile: Tile) -> SparseKernel:
        tiles, convolution = Tiles(*[tile] * 3), self.convolution
        kernel = (FrozenKernel if self.inference else SparseKernel)(tiles, self.dtype)
        if self.inference:
            kernel.plan = FrozenPlan(convolution, self.weight, tile, self.dtype)
        else:
            kernel.plan = Plan(convolution, self.mask, self.weight.stride(), tiles, self.dtype)
        return kernel

    def _dense_forward(self) -> Tensor:
        return functional.conv2d(self.dense_maps, self.dense_weight, None, *self.convolution[1:])

    def _dense_frozen(self) -> Callable[[], Tensor]:
        """The same as a compiled model with frozen weights runs it: they are laid out for oneDNN once. Where
        this torch, or this machine, has no operators for that, the product as it is."""
        _, stride, padding, dilation, groups = self.convolution
        mkldnn: Any = torch.ops.mkldnn
        maps, weight, plain = self.dense_maps, self.dense_weight, ("none", (), "")  # nothing fused with it

        def product() -> Tensor:
            return run().view(self.dense_gradient.shape)

        try:
            if self.convolution.is_flat and groups == 1 and maps.shape[2:] == (1, 1):
                rows = maps.flatten(1)
                packed = mkldnn._reorder_linear_weight(weight.flatten(1), len(rows))
                run = partial(mkldnn._linear_pointwise, rows, packed, None, *plain)
            else:
                geometry = (padding, stride, dilation, groups)
                packed = mkldnn._reorder_convolution_weight(weight, *geometry, maps.shape)
                run = partial(mkldnn._convolution_pointwise, maps, packed, None, *geometry, *plain)
            product()
        except (AttributeError, RuntimeError):
            return self._dense_forward
        return product

    def _dense_backward(self, which: int) -> Tensor:
        """Of the input (0) or of the weight (1)."""
        _, stride, padding, dilation, groups = self.convolution
        operands = (self.dense_gradient, self.dense_maps, self.dense_weight, None, stride, padding, dilation)
        wanted = [which == 0, which == 1, False]
        gradients = torch.ops.aten.convolution_backward(*operands, False, (0, 0), groups, wanted)
        gradient: Tensor = gradients[which]
        return gradient

    def _conversion(self) -> float:
        """Of maps, and in training of their gradient, at both ends of the layer."""
        passes = 1 if self.inference else 2
        ends = (self.dense_maps, self.dense_gradient)
        return sum(passes * _microseconds(lambda maps=maps: operator.to_innermost(maps)) for maps in ends)  # type: ignore[misc]


def _fill(noise: Tensor, size: tuple[int, int, int, int]) -> Tensor:
    """Of that size, channels_last, of noise again and again: drawing so much takes longer than products."""
    images, channels, height, width = size
    numel = math.prod(size)
    repeated = noise.repeat(-(-numel // len(noise)))[:numel]
    return repeated.view(images, height, width, channels).permute(0, 3, 1, 2)


def _fastest(
    dense: Callable[[], Tensor], sparse: Callable[[Any], Tensor], kernels: Sequence[Any]
) -> tuple[Timing, int]:
    """Times, and which kernel is the fastest. The least of few times each: a step has fifty layers, and each
    three products of some tiles. What disturbs a time makes it longer."""
    expected, found = dense(), sparse(kernels[0])
    some = slice(None, None, -(-expected.numel() // _COMPARED))  # of the images or outputs
    error = relative_error(found[some], expected[some])
    dense_us = min(_microseconds(dense) for _ in range(2))
    times = [_microseconds(partial(sparse, kernel)) for kernel in kernels]
    for _ in range(min(max(1, int(_AGAIN / min(times))), 5)):  # in turn: the machine is not always as fast
        for index, kernel in enumerate(kernels):
            if times[index] < 1.3 * min(times):
                times[index] = min(times[index], _microseconds(partial(sparse, kernel)))
    best = times.index(min(times))
    if best > 0:
        error = max(error, relative_error(sparse(kernels[best])[some], expected[some]))
    return Timing(dense_us, times[best], error), best


def _microseconds(call: Callable[[], Tensor]) -> float:
    began = time.perf_counter()
    call()
    return 1e6 * (time.perf_counter() - began)


_NOISE, _COMPARED = 2**18, 2**21  # numbers
_AGAIN = 2000  # microseconds for further times of one kernel


# Output rows, and units in a row, of tiles that there is code for (native/layer.cpp), by bytes of a vector;
# the usually fastest first
GRIDS = {
    64: ((1, 7), (2, 4), (1, 8), (2, 7), (1, 14), (1, 4), (1, 2)),
    32: ((1, 7), (2, 3), (1, 6), (1, 4), (1, 2)),
    16: ((1, 7), (2, 3), (1, 6), (1, 4), (1, 2)),
}
FIRST_CACHE, SECOND_CACHE = 40_000, 400_000  # bytes of slabs that stay there, with what else passes through


def candidates(shape: Shape, dtype: torch.dtype, inference: bool = False) -> list[Tile]:
    """Tiles that are worth measuring: those that waste least where a map is no multiple of them. In training
    three or four."""
    grids = GRIDS[vector_bytes()]
    units = -(-shape.images * dtype.itemsize // vector_bytes())
    height, width = shape.convolution.output_size(shape.height, shape.width)
    pixels = inference and lanes_are_pixels(shape.convolution, shape.images, dtype)
    if shape.convolution.is_flat or pixels:
        pitch = max(width, (shape.width - 1 + shape.padding_x) // shape.stride_x + 1)  # see native/plan.h
        whole = -(-shape.images * height * pitch * dtype.itemsize // vector_bytes())
        most = 7 if 14 < whole < 128 else 14  # better many tiles than few: a thread computes one at a time
        runs = sorted((run for rows, run in grids if rows == 1 and run <= most), reverse=True)
        padded = {run: -(-whole // run) * run for run in runs}  # units that are computed
        longest = [run for run in runs if padded[run] <= 1.2 * min(padded.values())]
        if inference:
            slabs = (FIRST_CACHE // 2, FIRST_CACHE, SECOND_CACHE)
            return [Tile(1, run, 1, slab) for run in longest for slab in slabs]
        tiles = [Tile(1, run, 1, SECOND_CACHE) for run in longest[:2]]
        return [*tiles, Tile(1, longest[0], 1, FIRST_CACHE)]
    fitting: dict[Tile, float] = {}
    for rows, run in grids:
        for count in (1, 2, 4):
            if run % count == 0 and count <= units:
                tile = Tile(rows, run // count, count, FIRST_CACHE)
                sizes = ((height, tile.rows), (width, tile.columns), (units, tile.units))
                fitting[tile] = math.prod(-(-whole // part) * part / whole for whole, part in sizes)
    least = min(fitting.values())
    best = [tile for tile, waste in fitting.items() if waste <= 1.1 * least][:3]
    return [*best, best[0]._replace(slab_bytes=SECOND_CACHE)]
