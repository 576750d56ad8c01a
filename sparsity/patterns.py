"""Which weights to keep: pure functions from weights to keep-masks.

A pattern is called with the weights by layer name and returns boolean keep-masks by the same names, of the
same shapes, on the same device: True is kept. Only magnitudes matter. Sources: Peste et al., NeurIPS 2021,
section 3 (top-k by magnitude, global and uniform) and appendix (2:4).

Each pattern has two rules for how many weights stay:

    "exact"     keeps exactly round(n * (1 - sparsity)) of n weights; of equal magnitudes the earlier stays
    "original"  what the paper's implementation computed: k = ceil(n * (1 - sparsity)), the threshold is the
                k-th largest of |w| + 1e-4, and only weights strictly above it stay: k - 1, fewer with ties
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from sparsity.select import kth_largest

Rule = Literal["exact", "original"]
Weights = Mapping[str, Tensor]
Masks = dict[str, Tensor]


class Pattern(Protocol):
    """What ACDC needs: weights by name in, boolean keep-masks by name out."""

    def __call__(self, weights: Weights) -> Masks: ...


@dataclass(frozen=True)
class _Magnitude:
    """sparsity: share of the weights to drop, 0 <= sparsity < 1."""

    sparsity: float
    rule: Rule = "exact"

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise ValueError(
                f"sparsity {self.sparsity}: the share of weights to drop, 0 <= sparsity < 1, e.g. 0.9"
            )
        _check_rule(self.rule)


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


@dataclass(frozen=True)
class NM:
    """Keep the n largest magnitudes of every m consecutive weights along the input channels: NM(2, 4) is 2:4.

    A convolution's weight (out, in, kh, kw) is read in (out, kh, kw, in) order, so that groups lie along the
    K dimension of the GEMM that computes it; a linear layer's along in_features. The rules differ only in
    which of equal magnitudes stays: the earlier ("exact") or the later ("original").
    """

    n: int
    m: int
    rule: Rule = "exact"

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m:
            raise ValueError(
                f"N:M sparsity {self.n}:{self.m}: n of every m weights stay, 0 < n < m, e.g. NM(2, 4)"
            )
        _check_rule(self.rule)

    @property
    def sparsity(self) -> float:
        return 1 - self.n / self.m

    def __call__(self, weights: Weights) -> Masks:
        return {name: self._mask(name, weight) for name, weight in weights.items()}

    def _mask(self, name: str, weight: Tensor) -> Tensor:
        if weight.numel() % self.m:
            raise ValueError(
                f"{self.n}:{self.m} sparsity: layer {name!r} has {weight.numel()} weights, shape "
                f"{tuple(weight.shape)}, not a multiple of {self.m}; exclude it"
            )
        input_last = weight.detach().movedim(1, -1)
        groups = input_last.reshape(-1, self.m).abs()
        if self.rule == "exact":
            kept = groups.argsort(dim=1, descending=True, stable=True)[:, : self.n]
        else:
            kept = groups.argsort(dim=1, stable=True)[:, self.m - self.n :]
        keep = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, kept, True)
        return keep.view(input_last.shape).movedim(-1, 1)

    def straddling(self, weights: Weights) -> list[str]:
        """Layers whose input channels are not a multiple of m: their groups run over the border of a kernel
        position (the paper's grouping), which no hardware kernel can use. A 3-channel stem is one."""
        return [name for name, weight in weights.items() if weight.shape[1] % self.m]


def _check_rule(rule: str) -> None:
    if rule not in get_args(Rule):
        raise ValueError(f"unknown rule {rule!r}; one of {', '.join(get_args(Rule))}")


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
