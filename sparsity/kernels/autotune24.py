"""Which layers run 2:4 kernels: each distinct shape measured against the dense kernel, and compared with it.

What is timed is what a training step runs: compressing the weight and multiplying, forwards; and where masks
are transposable the input gradient likewise. The weight gradient is dense either way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.benchmark import Timer

from sparsity.kernels.semi_structured import mm24, unfit
from sparsity.layers import Run24
from sparsity.patterns import NM
from sparsity.transposable import Transposable24

MARGIN = 0.98  # a sparse kernel is chosen below this share of the dense one's time
TOLERANCE = 1e-2  # of the greatest dense result: bf16 rounds by 2^-8 of a value
MIN_SECONDS = 0.05  # of measuring, each kernel


class Shape24(NamedTuple):
    """rows: images times output positions of a step on one device. inputs, outputs: channels."""

    rows: int
    inputs: int
    outputs: int


@dataclass(frozen=True)
class Timing:
    """Microseconds of the dense and of the 2:4 kernel. error: greatest difference of their results, as a
    share of the greatest result; None where the kernel failed, and why."""

    dense: float
    sparse: float | None
    error: float | None
    failure: str | None = None

    @property
    def wins(self) -> bool:
        return self.right and self.sparse is not None and self.sparse < MARGIN * self.dense

    @property
    def right(self) -> bool:
        return self.error is not None and self.error <= TOLERANCE


@dataclass(frozen=True)
class Tuned:
    """Of one shape. gradient: of the input gradient, only where masks are transposable."""

    forward: Timing
    gradient: Timing | None = None

    def choose(self, required: bool = False) -> Run24:
        """The fastest that is right; required: 2:4 wherever it is right, faster or not."""
        if not (self.forward.right if required else self.forward.wins):
            return Run24.NOT
        gradient = self.gradient
        if gradient is not None and (gradient.right if required else gradient.wins):
            return Run24.TRANSPOSED
        return Run24.FORWARD

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Tuned:
        """From what as_dict gave. Raises KeyError or TypeError for anything else."""
        gradient = values["gradient"]
        return cls(Timing(**values["forward"]), None if gradient is None else Timing(**gradient))


def candidates(
    layers: Mapping[str, nn.Module], positions: Mapping[str, Iterable[int]], images: int
) -> tuple[dict[str, Shape24], dict[str, str]]:
    """(layer -> the shape to measure, layer -> why it runs dense), over masked layers.

    positions: output positions of one image, by layer, for every call at every image size that is trained
    on; a layer must fit at all of them and is measured at the greatest. images: of a step on one device.
    """
    shapes, reasons = {}, {}
    for name, layer in layers.items():
        counts = sorted(positions.get(name, ()))
        if not counts:
            reasons[name] = "not run in a forward pass"
            continue
        why = next(filter(None, (unfit(layer, count * images) for count in counts)), None)
        if why is not None:
            reasons[name] = why
            continue
        outputs, inputs = layer.weight.shape[:2]  # type: ignore[index]
        shapes[name] = Shape24(counts[-1] * images, int(inputs), int(outputs))
    return shapes, reasons


def measure24(
    shape: Shape24,
    dtype: torch.dtype,
    device: torch.device,
    transposable: bool,
    seconds: Callable[[Callable[[], Any]], float] | None = None,
) -> Tuned:
    """Measure one shape with random operands. seconds: what times a call; for tests. Raises
    torch.OutOfMemoryError where there is no room for them."""
    random = torch.Generator(device).manual_seed(0)
    rows = torch.randn(shape.rows, shape.inputs, device=device, generator=random).to(dtype)
    grad = torch.randn(shape.rows, shape.outputs, device=device, generator=random).to(dtype)
    weight = torch.randn(shape.outputs, shape.inputs, device=device, generator=random)
    pattern = Transposable24() if transposable else NM(2, 4)
    weight = (weight * pattern({"weight": weight})["weight"]).to(dtype)
    time = seconds or median_seconds
    forward = _compare(lambda: functional.linear(rows, weight), lambda: mm24(rows, weight, False), time)
    if not transposable:
        return Tuned(forward)
    return Tuned(forward, _compare(lambda: grad @ weight, lambda: mm24(grad, weight.t(), False), time))


def _compare(
    dense: Callable[[], Tensor], sparse: Callable[[], Tensor], seconds: Callable[[Callable[[], Any]], float]
) -> Timing:
    expected = dense().float()
    dense_us = 1e6 * seconds(dense)
    try:
        found = sparse().float()
        error = ((found - expected).abs().max() / expected.abs().max()).item()
        return Timing(dense_us, 1e6 * seconds(sparse), error)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as failure:  # a kernel that does not take this shape
        return Timing(dense_us, None, None, str(failure).partition("\n")[0])


def median_seconds(call: Callable[[], Any]) -> float:
    """Median time of a call, the device waited for."""
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return float(timer.blocked_autorange(min_run_time=MIN_SECONDS).median)
