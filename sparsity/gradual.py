"""Gradual magnitude pruning (GMP): sparsity that grows by a cubic law within one sparse phase.

Zhu and Gupta 2017, "To prune, or not to prune", equation 1; the baseline of the AC/DC paper.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from sparsity.patterns import GlobalMagnitude, Pattern, UniformMagnitude
from sparsity.schedule import PhaseSchedule


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

    @property
    def settled(self) -> int:
        """The first of the epochs with at most twice the density of the last. Masks from then on tell which
        kernels pay for the rest of the run; the first ones, nearly dense, would tell that none do."""
        last = 1 - self.at(self.epochs[-1])
        return next(epoch for epoch in self.epochs if 1 - self.at(epoch) <= 2 * last)


def actions_of(
    pattern: Pattern, schedule: PhaseSchedule, gradual: CubicSparsity | None
) -> dict[int, Pattern | None]:
    """Epoch -> what happens as it begins: a pattern to compress by, or None to decompress."""
    actions: dict[int, Pattern | None] = dict.fromkeys(schedule.decompressions)
    if gradual is None:
        return {**actions, **dict.fromkeys(schedule.compressions, pattern)}
    if not isinstance(pattern, GlobalMagnitude | UniformMagnitude):
        raise ValueError(
            f"gradual pruning changes the sparsity of a magnitude pattern, which {pattern} is not"
        )
    if schedule.compressions != (gradual.start,) or actions:
        raise ValueError(
            f"gradual pruning from epoch {gradual.start} needs one sparse phase that begins there and lasts "
            f'to the end, e.g. "dense 1, sparse 89"; the schedule is "{schedule}"'
        )
    return {epoch: replace(pattern, sparsity=gradual.at(epoch)) for epoch in gradual.epochs}
