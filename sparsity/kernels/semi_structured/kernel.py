"""2:4 kernels for masked layers: what they ask of a mask, and how they compute."""

from __future__ import annotations

import re
from functools import cache
from typing import Any, NamedTuple

from torch import Tensor, nn

from sparsity.kernels.interface import Kernel
from sparsity.kernels.semi_structured.operator import conv24, mm24
from sparsity.kernels.semi_structured.packing import fits_24
from sparsity.kernels.semi_structured.search import DEFAULT, Algorithm, place


class Tuning(NamedTuple):
    """Algorithms that were found for a layer's products. place, dtype: where, see semi_structured.search.
    rows: of the products; for another number the default runs, because nothing else was compared with
    dense."""

    place: str
    dtype: str
    rows: int
    forward: Algorithm
    gradient: Algorithm = DEFAULT

    def __str__(self) -> str:
        return f"{self.place} {self.dtype} {self.rows}: {self.forward} {self.gradient}"


class Kernel24(Kernel):
    """The forward product sparse, for 2:4 masks; the input gradient is dense. tuning: None for the library's
    default algorithm. One object for each name: equal layers share compiled code."""

    title = "2:4 forward"
    transposed = False

    def __init__(self, tuning: Tuning | None = None) -> None:
        self.tuning = tuning
        self.name = self.title if tuning is None else f"{self.title} {tuning}"
        # another library or GPU may have no algorithm of that number, or a wrong one
        here = tuning if tuning is not None and tuning.place == place() else None
        self._rows = here.rows if here else None
        self._forward = list(here.forward) if here else None
        self._gradient = list(here.gradient) if here else None

    def __call__(self, layer: Any, input: Tensor) -> Tensor:
        weight = layer.weight * layer.mask
        if isinstance(layer, nn.Conv2d):
            height, width = input.shape[2:]
            rows = input.shape[0] * (-(-height // layer.stride[0])) * (-(-width // layer.stride[1]))
            algorithms = self._algorithms(rows)
            output = conv24(input, weight, layer.stride, self.transposed, *algorithms)
            return output if layer.bias is None else output + layer.bias.to(output.dtype)[:, None, None]
        flat = input.flatten(0, -2)
        output = mm24(flat, weight, self.transposed, *self._algorithms(flat.shape[0]))
        output = output.view(*input.shape[:-1], -1)
        return output if layer.bias is None else output + layer.bias.to(output.dtype)

    def _algorithms(self, rows: int) -> tuple[list[int] | None, list[int] | None]:
        return (self._forward, self._gradient) if rows == self._rows else (None, None)

    def fits(self, mask: Tensor) -> Tensor:
        return fits_24(mask.flatten(1))

    def __reduce__(self) -> Any:
        return from_name, (self.name,)  # copies, on other ranks too, are this one object


class Transposed24(Kernel24):
    """The input gradient sparse as well, for 2:4 masks whose transpose is 2:4, too."""

    title = "2:4 forward and input gradient"
    transposed = True
    sparse_products = 2

    def __init__(self, tuning: Tuning | None = None) -> None:
        super().__init__(tuning)
        self.fallback = kernel24(False, tuning and tuning._replace(gradient=DEFAULT))

    def fits(self, mask: Tensor) -> Tensor:
        return super().fits(mask) & fits_24(mask.flatten(1).t())


@cache
def kernel24(transposed: bool, tuning: Tuning | None, /) -> Kernel24:
    """The one object."""
    return Transposed24(tuning) if transposed else Kernel24(tuning)


FORWARD, TRANSPOSED = kernel24(False, None), kernel24(True, None)
_TUNING = re.compile(r"(\S+) (\S+) (\d+): (\d+)/(-?\d+)/(-?\d+) (\d+)/(-?\d+)/(-?\d+)")


def from_name(name: str) -> Kernel24 | None:
    """The kernel of that name; None for a name of another kind."""
    for transposed in (True, False):
        title = (TRANSPOSED if transposed else FORWARD).title
        if name == title:
            return kernel24(transposed, None)
        if name.startswith(f"{title} ") and (found := _TUNING.fullmatch(name.removeprefix(f"{title} "))):
            where, dtype, rows, *numbers = found.groups()
            forward, gradient = (Algorithm(*map(int, numbers[i : i + 3])) for i in (0, 3))
            return kernel24(transposed, Tuning(where, dtype, int(rows), forward, gradient))
    return None


class Run24:
    """How a layer computes: for ACDC.accelerate({name: Run24.FORWARD})."""

    NOT, FORWARD, TRANSPOSED = None, FORWARD, TRANSPOSED
