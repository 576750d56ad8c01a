"""How 2:4 kernels are measured and chosen.

What is timed is what a training step runs: compressing the weight and multiplying, forwards, against the
dense layer's own product; and where masks are transposable the input gradient likewise. Convolutions are
measured with their images, because dense ones are cuDNN's, and a stride above 1 costs a copy. The weight
gradient is the dense layer's either way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsity.flops import Call
from sparsity.kernels.interface import Kernel
from sparsity.kernels.measure import Measured, Timing, compare
from sparsity.kernels.semi_structured.kernel import FORWARD, TRANSPOSED, Kernel24, Tuning, from_name, kernel24
from sparsity.kernels.semi_structured.operator import (
    compress24,
    conv24,
    dense_gradients,
    input_gradient24,
    matmul24,
    mm24,
    reason_unsupported,
)
from sparsity.kernels.semi_structured.search import DEFAULT, Algorithm, algorithms, fastest, name_of, place
from sparsity.modules.layers import UnmaskedConv2d
from sparsity.patterns import NM, Transposable24


class Shape(NamedTuple):
    """Of a layer's product. rows: images times output positions of a step on one device. inputs, outputs:
    channels. height, width: of a convolution's input; 0 for a linear layer."""

    rows: int
    inputs: int
    outputs: int
    height: int = 0
    width: int = 0
    stride_y: int = 1
    stride_x: int = 1

    def __str__(self) -> str:
        product = " x ".join(f"{size:,}" for size in self[:3])
        return product + f" /{self.stride_y}" * (self.stride_y > 1)

    @property
    def image_size(self) -> tuple[int, int, int, int]:
        """(images, inputs, height, width) of a convolution."""
        positions = -(-self.height // self.stride_y) * -(-self.width // self.stride_x)
        return self.rows // positions, self.inputs, self.height, self.width


@dataclass(frozen=True)
class Family24:
    """See sparsity.kernels.interface. transposable: whether all masks are. search: for the fastest algorithm
    of each product; else the library's default is measured."""

    device: torch.device
    dtype: torch.dtype
    transposable: bool
    search: bool = True

    @property
    def key(self) -> str:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "reference"
        library = torch.backends.cusparselt.version()
        kind = "transposable" if self.transposable else "row-wise"
        return f"{name}, torch {torch.__version__}, cuSPARSELt {library}, {self.dtype}, {kind}, searched"

    between = None

    def has(self, kernel: Kernel) -> bool:
        if not isinstance(kernel, Kernel24):
            return False
        tuning = kernel.tuning
        return tuning is None or (tuning.place, tuning.dtype) == (place(), name_of(self.dtype))

    def shape(self, layer: Any, calls: Sequence[Call], images: int) -> Shape | str:
        if isinstance(layer, UnmaskedConv2d):
            return "not masked"
        reasons = (reason_unsupported(layer, call.outputs * images) for call in calls)
        if reason := next(filter(None, reasons), None):
            return reason
        outputs, inputs = map(int, layer.weight.shape[:2])
        greatest = max(calls, key=lambda call: call.outputs)
        shape = Shape(greatest.outputs * images, inputs, outputs)
        if isinstance(layer, nn.Linear):
            return shape
        return Shape(*shape[:3], greatest.height, greatest.width, *layer.stride)

    def measure(self, shape: Shape) -> Measured:
        return _Trial(self, shape).run()

    @staticmethod
    def choose(measured: Measured, required: bool = False) -> Kernel24 | None:
        forward, gradient = measured.forward, measured.gradient
        if not (forward.right if required else forward.wins):
            return None
        kernel = from_name(measured.kernel) or (FORWARD if gradient is None else TRANSPOSED)
        if gradient is None or (gradient.right if required else gradient.wins):
            return kernel
        return FORWARD if kernel.tuning is None else kernel24(False, kernel.tuning._replace(gradient=DEFAULT))


class _Product(NamedTuple):
    """rows @ weight.T, as the dense layer and as a 2:4 kernel compute it."""

    dense: Callable[[], Tensor]
    sparse: Callable[[Algorithm], Tensor]
    rows: Tensor
    weight: Tensor


class _Trial:
    """One shape's operands, with random weights and a random mask, and its products of both kinds."""

    def __init__(self, family: Family24, shape: Shape) -> None:
        self.family, self.shape = family, shape
        random = torch.Generator(family.device).manual_seed(0)

        def noise(*size: int) -> Tensor:
            return torch.randn(size, device=family.device, generator=random)

        weight = noise(shape.outputs, shape.inputs)
        pattern = Transposable24() if family.transposable else NM(2, 4)
        self.weight = (weight * pattern({"weight": weight})["weight"]).to(family.dtype)
        self.stride = [shape.stride_y, shape.stride_x]
        if shape.height:
            images, _, height, width = shape.image_size
            self.input = noise(images, height, width, shape.inputs).to(family.dtype).permute(0, 3, 1, 2)
            self.rows = (
                self.input[:, :, :: shape.stride_y, :: shape.stride_x].permute(0, 2, 3, 1).flatten(0, 2)
            )
        else:
            self.input = self.rows = noise(shape.rows, shape.inputs).to(family.dtype)
        self.grad = noise(shape.rows, shape.outputs).to(family.dtype)

    def run(self) -> Measured:
        if self.shape.height:
            forward, gradient = self._convolution()
        else:
            forward, gradient = self._linear()
        first, algorithm = self._compare(forward)
        second, other = self._compare(gradient) if self.family.transposable else (None, DEFAULT)
        tuning = None
        if algorithm != DEFAULT or other != DEFAULT:
            tuning = Tuning(place(), name_of(self.family.dtype), self.shape.rows, algorithm, other)
        return Measured(first, second, kernel=kernel24(self.family.transposable, tuning).name)

    def _compare(self, product: _Product) -> tuple[Timing, Algorithm]:
        """With the algorithm that is fastest, or the default where that one is wrong after all."""
        algorithm = self._search(product.rows, product.weight)
        timing = compare(product.dense, partial(product.sparse, algorithm))
        if algorithm == DEFAULT or timing.right:
            return timing, algorithm
        return compare(product.dense, partial(product.sparse, DEFAULT)), DEFAULT

    def _linear(self) -> tuple[_Product, _Product]:
        def product(rows: Tensor, weight: Tensor) -> _Product:
            dense = partial(functional.linear, rows, weight)
            return _Product(dense, lambda each: mm24(rows, weight, False, each), rows, weight)

        return product(self.rows, self.weight), product(self.grad, self.weight.t())

    def _convolution(self) -> tuple[_Product, _Product]:
        images, stride = self.input, self.stride
        weight = self.weight[:, :, None, None].contiguous(memory_format=torch.channels_last)
        count, _, height, width = images[:, :, :: stride[0], :: stride[1]].shape
        grad = self.grad.view(count, height, width, -1).permute(0, 3, 1, 2)

        return (
            _Product(
                lambda: functional.conv2d(images, weight, None, stride),
                lambda each: conv24(images, weight, stride, False, each),
                self.rows,
                self.weight,
            ),
            _Product(
                lambda: dense_gradients(grad, images, weight, stride, [True, False])[0],
                lambda each: input_gradient24(grad, images, weight, stride, each),
                self.grad,
                self.weight.t(),
            ),
        )

    def _search(self, rows: Tensor, weight: Tensor) -> Algorithm:
        """For rows @ weight.T."""
        if not self.family.search:
            return DEFAULT
        try:
            compressed = compress24(weight)
            among = algorithms(rows, compressed)
            if len(among) == 1:
                return among[0]
            product = partial(matmul24, rows, compressed, len(weight))
            return fastest(product, rows @ weight.t(), among)[0]
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # compare says what hinders the default, too
            return DEFAULT
