"""Kernels against the dense product: times and results of one shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

MARGIN = 0.98  # a sparse kernel is chosen below this share of the dense one's time
TOLERANCE = 1e-2  # of the greatest dense result: bf16 rounds by 2^-8 of a value
MIN_SECONDS = 0.05  # of measuring, each kernel


@dataclass(frozen=True)
class Timing:
    """Microseconds of the dense and of the sparse kernel. error: greatest difference of their results, as a
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
class Measured:
    """Of one shape. gradient, weight_gradient: of the input's and of the weight's, where they have a sparse
    kernel. conversion: microseconds of changing the memory format of input and output, once each and in both
    passes, for a layer that computes in another one than its neighbours. kernel: name of the one measured,
    where a family has several for one shape."""

    forward: Timing
    gradient: Timing | None = None
    weight_gradient: Timing | None = None
    conversion: float = 0.0
    kernel: str = ""

    @property
    def timings(self) -> list[Timing]:
        every = (self.forward, self.gradient, self.weight_gradient)
        return [timing for timing in every if timing is not None]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Measured:
        """From what as_dict gave. Raises KeyError or TypeError for anything else."""
        gradients = (
            None if values.get(name) is None else Timing(**values[name])
            for name in ("gradient", "weight_gradient")
        )
        conversion, kernel = values.get("conversion", 0.0), values.get("kernel", "")
        first, second = gradients
        measured = cls(Timing(**values["forward"]), first, second, conversion, kernel)
        for timing in measured.timings:
            sum((timing.dense, timing.sparse or 0.0, timing.error or 0.0), conversion)  # of numbers alone
        return measured


def compare(dense: Callable[[], Tensor], sparse: Callable[[], Tensor]) -> Timing:
    """Time both calls, and compare what they give."""
    expected = dense().float()
    dense_us = 1e6 * median_seconds(dense)
    try:
        error = relative_error(sparse(), expected)
        return Timing(dense_us, 1e6 * median_seconds(sparse), error)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as failure:  # a kernel that does not take this shape
        return Timing(dense_us, None, None, str(failure).partition("\n")[0])


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Greatest difference, as a share of the greatest expected value."""
    greatest = expected.abs().max().item()
    return (found - expected).abs().max().item() / (greatest or 1.0)


def median_seconds(call: Callable[[], Any]) -> float:
    """Median time of a call, the device waited for."""
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return float(timer.blocked_autorange(min_run_time=MIN_SECONDS).median)
