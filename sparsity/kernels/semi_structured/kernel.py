"""2:4 kernels for masked layers: what they ask of a mask, how they are measured and chosen.

What is timed is what a training step runs: compressing the weight and multiplying, forwards; and where masks
are transposable the input gradient likewise. The weight gradient is dense either way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsity.flops import Call
from sparsity.kernels.interface import Kernel
from sparsity.kernels.measure import Measured, compare
from sparsity.kernels.semi_structured.operator import conv24, linear24, mm24, reason_unsupported
from sparsity.kernels.semi_structured.packing import fits_24
from sparsity.layers import UnmaskedConv2d
from sparsity.patterns import NM
from sparsity.transposable import Transposable24


class Kernel24(Kernel):
    """The forward product sparse, for 2:4 masks; the input gradient is dense."""

    name = "2:4 forward"
    transposed = False

    def __call__(self, layer: Any, input: Tensor) -> Tensor:
        weight = layer.weight * layer.mask
        if isinstance(layer, nn.Conv2d):
            return conv24(input, weight, layer.bias, layer.stride, self.transposed)
        return linear24(input, weight, layer.bias, self.transposed)

    def fits(self, mask: Tensor) -> Tensor:
        return fits_24(mask.flatten(1))

    def __reduce__(self) -> str:
        return "FORWARD"  # copies, on other ranks too, are this one object


class Transposed24(Kernel24):
    """The input gradient sparse as well, for 2:4 masks whose transpose is 2:4, too."""

    name = "2:4 forward and input gradient"
    transposed = True
    sparse_products = 2

    def fits(self, mask: Tensor) -> Tensor:
        return super().fits(mask) & fits_24(mask.flatten(1).t())

    def __reduce__(self) -> str:
        return "TRANSPOSED"


FORWARD, TRANSPOSED = Kernel24(), Transposed24()
Transposed24.fallback = FORWARD


class Run24:
    """How a layer computes: for ACDC.accelerate({name: Run24.FORWARD})."""

    NOT, FORWARD, TRANSPOSED = None, FORWARD, TRANSPOSED


class Shape(NamedTuple):
    """Of a layer's product. rows: images times output positions of a step on one device. inputs, outputs:
    channels."""

    rows: int
    inputs: int
    outputs: int

    def __str__(self) -> str:
        return " x ".join(f"{size:,}" for size in self)


@dataclass(frozen=True)
class Family24:
    """See sparsity.kernels.interface. transposable: whether all masks are."""

    device: torch.device
    dtype: torch.dtype
    transposable: bool

    @property
    def key(self) -> str:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "reference"
        library = torch.backends.cusparselt.version()
        kind = "transposable" if self.transposable else "row-wise"
        return f"{name}, torch {torch.__version__}, cuSPARSELt {library}, {self.dtype}, {kind}"

    between = None

    def has(self, kernel: Kernel) -> bool:
        return isinstance(kernel, Kernel24)

    def shape(self, layer: Any, calls: Sequence[Call], images: int) -> Shape | str:
        if isinstance(layer, UnmaskedConv2d):
            return "not masked"
        rows = sorted(call.outputs * images for call in calls)
        reasons = filter(None, (reason_unsupported(layer, count) for count in rows))
        outputs, inputs = layer.weight.shape[:2]
        return next(reasons, None) or Shape(rows[-1], int(inputs), int(outputs))

    def measure(self, shape: Shape) -> Measured:
        random = torch.Generator(self.device).manual_seed(0)

        def noise(*size: int) -> Tensor:
            return torch.randn(size, device=self.device, generator=random)

        rows = noise(shape.rows, shape.inputs).to(self.dtype)
        grad = noise(shape.rows, shape.outputs).to(self.dtype)
        weight = noise(shape.outputs, shape.inputs)
        pattern = Transposable24() if self.transposable else NM(2, 4)
        weight = (weight * pattern({"weight": weight})["weight"]).to(self.dtype)
        forward = compare(lambda: functional.linear(rows, weight), lambda: mm24(rows, weight, False))
        if not self.transposable:
            return Measured(forward)
        return Measured(forward, compare(lambda: grad @ weight, lambda: mm24(grad, weight.t(), False)))

    @staticmethod
    def choose(measured: Measured, required: bool = False) -> Kernel24 | None:
        forward, gradient = measured.forward, measured.gradient
        if not (forward.right if required else forward.wins):
            return None
        if gradient is not None and (gradient.right if required else gradient.wins):
            return TRANSPOSED
        return FORWARD
