"""Masks that no magnitude chose: the baselines of sparse training.

RandomMask draws one at random. DropAndGrow changes a mask in force: the smallest kept weights go, as many
others come at random, which every epoch is Sparse Evolutionary Training (SET: Mocanu et al., Nature
Communications 2018).

How many weights a layer keeps follows the Erdos-Renyi-Kernel law (Evci et al., "Rigging the Lottery", ICML
2020, section 3): its density is proportional to the sum of the weight's dimensions over their product, so
small layers stay denser, and a layer for which that gives more than 1 stays dense.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsity.patterns.interface import Masks, Weights, check_sparsity


@dataclass(frozen=True)
class RandomMask:
    """Keep randomly drawn weights. sparsity: share to drop, 0 <= sparsity < 1. The draw depends on the seed
    and the layers' shapes alone, not on device, ranks or weights."""

    sparsity: float
    seed: int = 0

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity)

    def __call__(self, weights: Weights) -> Masks:
        shares = _order(weights, self.seed)
        kept = num_kept(weights, self.sparsity)
        return {name: _first(shares[name], kept[name]) for name in weights}


@dataclass(frozen=True)
class DropAndGrow:
    """One update of a random mask: of the weights that a layer keeps, drop the share of smallest magnitudes;
    of those that were dropped before, let as many grow, from 0.

    share: of the kept weights, 0 to 1. seed: another for each update. Weights that are exactly 0 count as
    dropped. A layer grows no more than were dropped, so one that is dense stays so.
    """

    sparsity: float
    share: float
    seed: int

    def __call__(self, weights: Weights) -> Masks:
        order = _order(weights, self.seed)
        kept = num_kept(weights, self.sparsity)
        return {
            name: self._mask(weight.detach(), order[name], kept[name]) for name, weight in weights.items()
        }

    def _mask(self, weight: Tensor, order: Tensor, kept: int) -> Tensor:
        grown = min(round(self.share * kept), weight.numel() - kept)
        stay = _first(weight.abs(), kept - grown)
        rank = (order - (weight != 0).to(order.dtype)).masked_fill(
            stay, -2
        )  # those dropped before come first
        return stay | _first(rank, grown)


def num_kept(weights: Weights, sparsity: float) -> dict[str, int]:
    """How many weights each layer keeps: Erdos-Renyi-Kernel densities whose total is 1 - sparsity, up to one
    weight in each layer."""
    sizes = {name: weight.numel() for name, weight in weights.items()}
    raw = {name: sum(weight.shape) / sizes[name] for name, weight in weights.items()}
    dense: set[str] = set()
    while True:
        left = (1 - sparsity) * sum(sizes.values()) - sum(sizes[name] for name in dense)
        others = [name for name in sizes if name not in dense]
        scale = left / sum(raw[name] * sizes[name] for name in others) if others else 0.0
        full = {name for name in others if scale * raw[name] > 1}
        if not full:
            break
        dense |= full
    return {
        name: size if name in dense else math.floor(scale * raw[name] * size + 0.5)
        for name, size in sizes.items()
    }


def _order(weights: Weights, seed: int) -> dict[str, Tensor]:
    """float64 in [0, 1) for each weight, drawn on the CPU: the same wherever it is asked for."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(weight.shape, generator=generator, dtype=torch.float64).to(weight.device)
        for name, weight in weights.items()
    }


def _first(values: Tensor, count: int) -> Tensor:
    """Keep-mask of the `count` largest; of equal ones the earlier."""
    flat = values.flatten()
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[flat.argsort(descending=True, stable=True)[:count]] = True
    return mask.view(values.shape)
