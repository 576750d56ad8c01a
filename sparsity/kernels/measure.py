"""Kernels against the dense product: times and results of one shape.

On a GPU times are the device's own. A compiled step runs ahead of its device, so what launching costs the
host is hidden there; timed by the host, a product of 20 microseconds would measure its launch.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

MARGIN = 0.98  # a sparse kernel is chosen below this share of the dense one's time
TOLERANCE = 1e-2  # of the greatest dense result: bf16 rounds by 2^-8 of a value
MIN_SECONDS = 0.05  # of measuring, each kernel
TURN = 8  # calls that a device is given at once, at most
TURNS = (3, 25)  # at least, at most
HOLD = 400_000  # cycles, a fifth of a millisecond: for how long a device waits before a turn, at first
LONGEST_HOLD = 256 * HOLD


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
        given = (values.get(name) for name in ("gradient", "weight_gradient"))
        first, second = (None if each is None else Timing(**each) for each in given)
        conversion, kernel = values.get("conversion", 0.0), values.get("kernel", "")
        if not isinstance(kernel, str):
            raise TypeError(f"kernel is {kernel!r}, no name")
        measured = cls(Timing(**values["forward"]), first, second, conversion, kernel)
        for timing in measured.timings:
            sum((timing.dense, timing.sparse or 0.0, timing.error or 0.0), conversion)  # of numbers alone
        return measured


def compare(dense: Callable[[], Tensor], sparse: Callable[[], Tensor]) -> Timing:
    """Time both calls, and compare what they give."""
    result = dense()
    device, expected = result.device, result.to(torch.float32, copy=True)
    spoil(result)
    del result  # a kernel that writes nothing would find the right results in its memory
    error = sparse_us = failure = None
    try:
        error = relative_error(sparse(), expected)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as reason:  # a kernel that does not take this shape
        failure = str(reason).partition("\n")[0]
    dense_us = 1e6 * median_seconds(dense, device)
    if failure is None:
        sparse_us = 1e6 * median_seconds(sparse, device)
    return Timing(dense_us, sparse_us, error, failure)


def spoil(result: Tensor) -> None:
    """Fill with NaN a result that is to be freed: the allocator gives its memory to the next of its size."""
    result.detach().fill_(torch.nan)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Greatest difference, as a share of the greatest expected value."""
    greatest = expected.abs().max().item()
    return (found - expected).abs().max().item() / (greatest or 1.0)


def median_seconds(call: Callable[[], Any], device: torch.device, least: float = MIN_SECONDS) -> float:
    """Median time of a call that computes on the device, over at least so many seconds of them."""
    if device.type == "cuda":
        return _median_on_cuda(call, device, least)
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return float(timer.blocked_autorange(min_run_time=least).median)


def _median_on_cuda(call: Callable[[], Any], device: torch.device, least: float) -> float:
    """By events around turns of several calls. Each turn begins with a wait on the device, long enough that
    all of its calls are queued before the first one runs."""
    clock: Any = torch.cuda
    with torch.cuda.device(device):
        call()  # takes memory, loads code
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        torch.cuda.synchronize()
        calls = max(1, min(TURN, int(least / TURNS[0] / (time.perf_counter() - begin))))
        hold, seconds = HOLD, list[float]()
        while len(seconds) < TURNS[0] or (len(seconds) < TURNS[1] and calls * sum(seconds) < least):
            first, last = clock.Event(enable_timing=True), clock.Event(enable_timing=True)
            clock._sleep(hold)
            first.record()
            for _ in range(calls):
                call()
            last.record()
            late = first.query()  # the device did not wait for the host, but the host for the device
            torch.cuda.synchronize()
            if late and hold < LONGEST_HOLD:
                hold *= 2
            else:
                seconds.append(first.elapsed_time(last) / 1e3 / calls)
        return statistics.median(seconds)
