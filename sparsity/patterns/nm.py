"""N:M sparsity: n of every m consecutive weights stay (Peste et al., NeurIPS 2021, appendix: 2:4)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsity.patterns.interface import Masks, Rule, Weights, check_rule


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
        check_rule(self.rule)

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
