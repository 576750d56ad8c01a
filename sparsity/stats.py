"""Figures about masks. Sparsity is the share of dropped weights; density is 1 - sparsity."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Sparsity:
    """Counts over the masked (prunable) weights, and over all parameters: biases and norms, too."""

    num_weights: int
    num_kept: int
    num_parameters: int
    by_layer: dict[str, float]

    @property
    def overall(self) -> float:
        """Over the masked weights: the paper's definition."""
        return 1 - self.num_kept / self.num_weights if self.num_weights else 0.0

    @property
    def of_all_parameters(self) -> float:
        return (self.num_weights - self.num_kept) / self.num_parameters

    @property
    def density_by_layer(self) -> dict[str, float]:
        return {name: 1 - share for name, share in self.by_layer.items()}


def measure(model: nn.Module, masks: Mapping[str, Tensor]) -> Sparsity:
    """Count the kept weights of keep-masks by layer name. One device read for all layers."""
    kept = torch.stack([mask.sum() for mask in masks.values()]).tolist() if masks else []
    sizes = [mask.numel() for mask in masks.values()]
    return Sparsity(
        num_weights=sum(sizes),
        num_kept=sum(kept),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        by_layer={name: 1 - k / n for name, k, n in zip(masks, kept, sizes, strict=True)},
    )


VECTORS = "biases, norms and other vectors"


def shares_unpruned(model: nn.Module, masked: Iterable[str]) -> dict[str, float]:
    """Parameter that has no mask -> its share of all parameters, the greatest first; those of one dimension
    together, as VECTORS. masked: names of the layers that have one."""
    of_layers = {own for name in masked for own in (name, f"{name}.weight".lstrip("."))}
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        if name not in of_layers:
            vector = sum(size > 1 for size in parameter.shape) < 2
            counts[VECTORS if vector else name] += parameter.numel()
    total = sum(parameter.numel() for parameter in model.parameters())
    return {name: count / total for name, count in counts.most_common()}


@dataclass(frozen=True)
class MaskChange:
    """Masked weights from one compression to the next, over all layers. kept: by both; dropped: kept before;
    regrown: dropped before. The rest of num_weights was dropped by both."""

    kept: int
    dropped: int
    regrown: int
    num_weights: int

    @classmethod
    def between(cls, old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> MaskChange:
        """Of keep-masks by layer name, not none. One device read for all layers."""
        counts = torch.stack(
            [
                torch.stack([(old[name] & mask).sum(), old[name].sum(), mask.sum()])
                for name, mask in new.items()
            ]
        )
        kept, before, after = counts.sum(dim=0).tolist()
        return cls(kept, before - kept, after - kept, sum(mask.numel() for mask in new.values()))

    def as_record(self) -> dict[str, int]:
        return {"mask_kept": self.kept, "mask_dropped": self.dropped, "mask_regrown": self.regrown}

    @property
    def relative(self) -> float:
        """What differs, dropped + regrown, less the growth, dropped - regrown: relative_mask_difference."""
        return 2 * self.regrown / self.num_weights


def relative_mask_difference(old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> float:
    """Share of the masked weights that changed sides between two compressions, beyond the growth in sparsity.

    Per layer: number of differing entries minus the growth of the number of dropped ones; summed, over the
    number of weights (the measure that the paper's implementation logs, there in percent). 0 is no change.
    """
    return MaskChange.between(old, new).relative


def num_leaked(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> int:
    """Number of dropped weights that are not exactly 0: 0 at any time of a compressed phase."""
    return int(torch.stack([((weights[name] != 0) & ~mask).sum() for name, mask in masks.items()]).sum())
