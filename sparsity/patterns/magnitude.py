"""The largest magnitudes stay, of all layers together or of each (Peste et al., NeurIPS 2021, section 3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsity.patterns.interface import Masks, Rule, Weights, check_rule, check_sparsity
from sparsity.patterns.select import kth_largest


@dataclass(frozen=True)
class _Magnitude:
    """sparsity: share of the weights to drop, 0 <= sparsity < 1."""

    sparsity: float
    rule: Rule = "exact"

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity)
        check_rule(self.rule)


class GlobalMagnitude(_Magnitude):
    """Keep the largest magnitudes over all layers together: one threshold for the whole network."""

    def __call__(self, weights: Weights) -> Masks:
        masks = _keep_largest(list(weights.values()), self.sparsity, self.rule)
        return dict(zip(weights, masks, strict=True))


class UniformMagnitude(_Magnitude):
    """Keep the largest magnitudes of each layer by itself: every layer has the same sparsity."""

    def __call__(self, weights: Weights) -> Masks:
        return {
            name: _keep_largest([weight], self.sparsity, self.rule)[0] for name, weight in weights.items()
        }


def _keep_largest(weights: Sequence[Tensor], sparsity: float, rule: Rule) -> list[Tensor]:
    """Boolean keep-masks of the largest magnitudes of all weights together."""
    if sparsity == 0:
        return [torch.ones_like(weight, dtype=torch.bool) for weight in weights]
    n = sum(weight.numel() for weight in weights)
    magnitudes = [weight.detach().abs() for weight in weights]
    if rule == "original":
        for part in magnitudes:
            part += 1e-4
        kth = kth_largest(magnitudes, math.ceil(n * (1 - sparsity)))
        return [part > kth.value for part in magnitudes]
    k = n - round(n * sparsity)
    if k == 0:
        return [torch.zeros_like(weight, dtype=torch.bool) for weight in weights]
    kth = kth_largest(magnitudes, k)
    if kth.above + kth.equal == k:
        return [part >= kth.value for part in magnitudes]
    masks, ties = [part > kth.value for part in magnitudes], k - kth.above
    for part, mask in zip(magnitudes, masks, strict=True):  # in the logical order of the weights
        equal = (part == kth.value).nonzero()[:ties]
        mask[tuple(equal.T)] = True
        ties -= len(equal)
        if ties == 0:
            break
    return masks
