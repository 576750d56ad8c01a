"""cuSPARSELt's algorithms for one product: which there are, and the fastest one that is right.

An algorithm's number means something for one version of the library, one kind of GPU and one dtype alone. Not
every number is right for every shape, so each is compared with the dense product before it is taken. The
library's default is among them, and is what remains where no other one is right and faster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsity.kernels.measure import MARGIN, TOLERANCE, median_seconds, relative_error, spoil

SECONDS = 1e-3  # of measuring, each algorithm


class Algorithm(NamedTuple):
    """As torch._cslt_sparse_mm takes it (torch 2.11 to 2.13). split_k: parts that the sum over the inputs is
    cut into. split_k_mode: how, a number of the library's, where it is cut; -1: as the library does."""

    number: int = 0
    split_k: int = 1
    split_k_mode: int = -1

    def __str__(self) -> str:
        return "/".join(map(str, self))


DEFAULT = Algorithm()


def place() -> str:
    """Where algorithms' numbers mean what they mean on this machine: GPU and library, as one word."""
    if not torch.cuda.is_available():
        return "reference"
    major, minor = torch.cuda.get_device_capability()
    return f"sm{major}{minor}/{torch.backends.cusparselt.version()}"


def name_of(dtype: torch.dtype) -> str:
    """As a word: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def algorithms(rows: Tensor, compressed: Tensor) -> list[Algorithm]:
    """Those that the library names for this product, the default first, then what its own search likes best.
    rows, compressed: as operator.matmul24 takes them."""
    if rows.device.type != "cuda" or rows.dtype != torch.bfloat16:
        # In fp16 the search of cuSPARSELt 0.8.0 ended on an H200 in an illegal instruction, and with it every
        # later call of the process
        return [DEFAULT]
    library: Any = getattr(torch._C, "_cusparselt", None)
    try:
        best, split_k, mode, count = library.mm_search(compressed, rows.t(), None, None, None, True)
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, RuntimeError, TypeError, ValueError):  # another torch, or no answer
        return [DEFAULT]
    found = Algorithm(best, split_k, mode if split_k != 1 else DEFAULT.split_k_mode)
    return list(dict.fromkeys([DEFAULT, found, *map(Algorithm, range(count))]))


def fastest(
    product: Callable[[Algorithm], Tensor], expected: Tensor, among: Iterable[Algorithm]
) -> tuple[Algorithm, dict[Algorithm, float | None]]:
    """The fastest that is right, DEFAULT where none is faster than that; and the seconds of each, None for
    one that is not right.

    product: computes with an algorithm. expected: the dense result. Right is what comes close to it, and
    gives the same bits twice: a resumed run must equal the uninterrupted one."""
    exact = expected.float()
    seconds: dict[Algorithm, float | None] = {}
    for algorithm in among:
        run = partial(product, algorithm)
        try:
            right = _is_right(run, expected, exact)
            seconds[algorithm] = median_seconds(run, expected.device, SECONDS) if right else None
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # not for this shape
            seconds[algorithm] = None
    times = {algorithm: time for algorithm, time in seconds.items() if time is not None}
    best = min(times, key=times.__getitem__, default=DEFAULT)
    gains = DEFAULT not in times or times.get(best, 0.0) < MARGIN * times[DEFAULT]
    return best if gains else DEFAULT, seconds


def _is_right(run: Callable[[], Tensor], expected: Tensor, exact: Tensor) -> bool:
    spoil(torch.empty_like(expected))  # where the result will be
    found = run()
    if not relative_error(found, exact) <= TOLERANCE:  # NaN is not
        return False
    first = found.clone()
    spoil(found)
    del found
    return torch.equal(run(), first)
