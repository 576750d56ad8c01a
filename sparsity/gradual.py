"""Training whose masks change within one sparse phase: the baselines of AC/DC.

CubicSparsity: gradual magnitude pruning (GMP), sparsity that grows by a cubic law (Zhu and Gupta 2017, "To
prune, or not to prune", equation 1; the baseline of the AC/DC paper). Regrowth: dynamic sparse training at a
fixed sparsity (SET: Mocanu et al., Nature Communications 2018).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from sparsity.patterns import DropAndGrow, GlobalMagnitude, Pattern, RandomMask, UniformMagnitude
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


@dataclass(frozen=True)
class Regrowth:
    """Within the sparse phase, every so many epochs below `end`, each layer drops the share of its kept
    weights that is smallest and grows as many others at random. The share falls from `share` by a half cosine
    to 0 at `end` (Evci et al., ICML 2020, section 3)."""

    share: float
    end: int
    every: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"share {self.share}: of the kept weights, 0 < share < 1, e.g. 0.3")
        if self.every < 1:
            raise ValueError(f"every {self.every} epochs: 1 or more")

    def at(self, epoch: int, start: int) -> float:
        """The share that changes at the beginning of `epoch`, in a sparse phase from `start` on."""
        return self.share / 2 * (1 + math.cos(math.pi * (epoch - start) / (self.end - start)))


def actions_of(
    pattern: Pattern, schedule: PhaseSchedule, changing: CubicSparsity | Regrowth | None
) -> dict[int, Pattern | None]:
    """Epoch of the schedule -> what happens as it begins: a pattern to compress by, or None to decompress."""
    actions: dict[int, Pattern | None] = dict.fromkeys(schedule.decompressions)
    if changing is None:
        return {**actions, **dict.fromkeys(schedule.compressions, pattern)}
    if len(schedule.compressions) != 1 or actions:
        raise ValueError(
            "masks that change within a phase need one sparse phase that lasts to the end, e.g. "
            f'"dense 1, sparse 89"; the schedule is "{schedule}"'
        )
    (start,) = schedule.compressions
    if isinstance(changing, CubicSparsity):
        return _growing_sparsity(pattern, start, schedule.num_epochs, changing)
    return _regrowing(pattern, start, schedule.num_epochs, changing)


def settled(actions: Mapping[int, Pattern | None]) -> int:
    """The first compression with at most twice the density of the last, by its epoch; 0 without any. Masks
    from then on tell which kernels pay for the rest of the run; those of early gradual pruning, nearly dense,
    would tell that none do. actions: see actions_of."""
    density = {
        epoch: 1 - float(getattr(pattern, "sparsity", 0.0))
        for epoch, pattern in sorted(actions.items(), key=lambda action: action[0])
        if pattern is not None
    }
    return next((epoch for epoch in density if density[epoch] <= 2 * density[max(density)]), 0)


def _growing_sparsity(
    pattern: Pattern, start: int, num_epochs: int, law: CubicSparsity
) -> dict[int, Pattern | None]:
    if not isinstance(pattern, GlobalMagnitude | UniformMagnitude):
        raise ValueError(
            f"gradual pruning changes the sparsity of a magnitude pattern, which {pattern} is not"
        )
    if start != law.start:
        raise ValueError(
            f"gradual pruning from epoch {law.start} needs a sparse phase that begins there, not in {start}"
        )
    epochs = range(start, min(law.end, num_epochs), law.every)
    return {epoch: replace(pattern, sparsity=law.at(epoch)) for epoch in epochs}


def _regrowing(pattern: Pattern, start: int, num_epochs: int, law: Regrowth) -> dict[int, Pattern | None]:
    if not isinstance(pattern, RandomMask):
        raise ValueError(f"regrowth goes on from a random mask, which {pattern} does not draw")
    if law.end <= start:
        raise ValueError(f"regrowth until epoch {law.end} must end behind epoch {start}, where masks begin")
    updates = {
        epoch: DropAndGrow(pattern.sparsity, law.at(epoch, start), pattern.seed + epoch)
        for epoch in range(start + law.every, min(law.end, num_epochs), law.every)
    }
    return {start: pattern, **updates}
