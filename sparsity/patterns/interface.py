"""What a pattern is: a pure function from weights to keep-masks, by layer name.

Masks are boolean, of the weights' shapes and devices: True is kept. Patterns of magnitudes have two rules for
how many weights stay:

    "exact"     keeps exactly round(n * (1 - sparsity)) of n weights; of equal magnitudes the earlier stays
    "original"  what the paper's implementation computed: k = ceil(n * (1 - sparsity)), the threshold is the
                k-th largest of |w| + 1e-4, and only weights strictly above it stay: k - 1, fewer with ties
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Protocol, get_args

from torch import Tensor

Rule = Literal["exact", "original"]
Weights = Mapping[str, Tensor]
Masks = dict[str, Tensor]


class Pattern(Protocol):
    """What ACDC needs: weights by name in, boolean keep-masks by name out."""

    def __call__(self, weights: Weights) -> Masks: ...


def check_rule(rule: str) -> None:
    if rule not in get_args(Rule):
        raise ValueError(f"unknown rule {rule!r}; one of {', '.join(get_args(Rule))}")


def check_sparsity(sparsity: float) -> None:
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity {sparsity}: the share of weights to drop, 0 <= sparsity < 1, e.g. 0.9")
