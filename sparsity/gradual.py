"""Gradual magnitude pruning (GMP): sparsity that grows by a cubic law within one sparse phase.

Zhu and Gupta 2017, "To prune, or not to prune", equation 1; the baseline of the AC/DC paper.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CubicSparsity:
    """Compressions at the beginning of epochs start, start + every, ... below end, with a sparsity that grows
    from `initial` towards `final`, which it would reach at `end`.

    The paper's implementation acts at epochs below `end` only: with start 1, every 5 and end 40 the last is
    epoch 36, a little short of `final`.
    """

    initial: float
    final: float
    start: int
    end: int
    every: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.initial <= self.final < 1:
            raise ValueError(f"sparsity from {self.initial} to {self.final}: 0 <= initial <= final < 1")
        if not 0 <= self.start < self.end or self.every < 1:
            raise ValueError(
                f"epochs from {self.start} to {self.end} every {self.every}: 0 <= start < end, every >= 1"
            )

    @property
    def epochs(self) -> range:
        """The epochs at whose beginning weights are dropped."""
        return range(self.start, self.end, self.every)

    def at(self, epoch: int) -> float:
        """The sparsity asked for at the beginning of `epoch`; constant before start and from end on."""
        progress = min(max((epoch - self.start) / (self.end - self.start), 0.0), 1.0)
        return self.final + (self.initial - self.final) * (1 - progress) ** 3
