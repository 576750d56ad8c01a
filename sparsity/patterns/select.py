"""The k-th largest of many tensors together, without putting them into one.

On a CPU by counting: the bit patterns of non-negative float32 numbers have the numbers' order, so a histogram
of their upper 15 bits finds the bucket of the k-th largest, and a histogram of the lower 16 bits within that
bucket the number itself. Two passes over memory, exact, several times faster than a selection over a copy of
all. On a GPU bit by bit, from the highest: how many values have at least these bits? 31 passes, 3 GB of reads
for ResNet50, without waiting for the device until the end. Other types: a selection over a copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

UPPER, LOWER = 15, 16  # bits of a non-negative float32


class Kth(NamedTuple):
    """value: the k-th largest. above, equal: how many values are greater, and how many are the same."""

    value: float
    above: int
    equal: int


def kth_largest(values: Sequence[Tensor], k: int) -> Kth:
    """The k-th largest of non-negative `values` together, 1 <= k <= their number. NaN is not supported."""
    if all(part.dtype == torch.float32 for part in values):
        on_cpu = values[0].device.type == "cpu"
        return _by_counting(values, k) if on_cpu else _by_bisection(values, k)
    flat = torch.cat([part.flatten() for part in values])
    value = flat.kthvalue(flat.numel() - k + 1).values
    above, equal = torch.stack([(flat > value).sum(), (flat == value).sum()]).tolist()
    return Kth(value.item(), int(above), int(equal))


def _by_counting(values: Sequence[Tensor], k: int) -> Kth:
    bits = [_dense(part).view(torch.int32) for part in values]
    upper = _histogram((part >> LOWER for part in bits), 1 << UPPER)
    bucket, above = _descend(upper, k)
    shifted = bucket << LOWER
    # everything outside the bucket goes to one further place
    lower = _histogram(
        ((part - shifted).masked_fill_((part >> LOWER) != bucket, 1 << LOWER) for part in bits),
        (1 << LOWER) + 1,
    )[:-1]
    low, above_within = _descend(lower, k - above)
    value = torch.tensor(shifted | low, dtype=torch.int32).view(torch.float32)
    return Kth(value.item(), above + above_within, int(lower[low]))


def _by_bisection(values: Sequence[Tensor], k: int) -> Kth:
    bits = [_dense(part).view(torch.int32) for part in values]
    found = torch.zeros((), dtype=torch.int32, device=bits[0].device)
    for bit in reversed(range(UPPER + LOWER)):
        candidate = found | (1 << bit)
        found = torch.where(_count([part >= candidate for part in bits]) >= k, candidate, found)
    above, equal = _count([part > found for part in bits]), _count([part == found for part in bits])
    value, *counts = torch.stack(
        [found.view(torch.float32).double(), above.double(), equal.double()]
    ).tolist()
    return Kth(value, *map(int, counts))


def _count(chosen: Sequence[Tensor]) -> Tensor:
    return torch.stack([part.sum() for part in chosen]).sum()


def _histogram(parts: Iterable[Tensor], size: int) -> Tensor:
    counts = torch.zeros(size, dtype=torch.int64)
    for part in parts:
        counts += torch.bincount(part, minlength=size)
    return counts


def _descend(counts: Tensor, k: int) -> tuple[int, int]:
    """The place of the k-th largest in a histogram, and how many lie in higher places."""
    at_or_above = counts.flip(0).cumsum(0).flip(0)
    place = int((at_or_above >= k).nonzero().max())
    return place, int(at_or_above[place] - counts[place])


def _dense(values: Tensor) -> Tensor:
    """All values in one dimension, in the order they lie in memory: a view unless there are gaps."""
    order = sorted(range(values.dim()), key=values.stride, reverse=True)
    return values.permute(order).reshape(-1)
