"""When the network is dense and when it is sparse, as a pure value.

    schedule = PhaseSchedule.parse("dense 10, (sparse 5, dense 5) x6, sparse 5, dense 10, sparse 15")
    schedule.num_epochs        # 100
    schedule.compressions      # (10, 20, 30, 40, 50, 60, 70, 85): masks are chosen as these epochs begin
    schedule.decompressions    # (15, 25, 35, 45, 55, 65, 75)

That is the paper's ImageNet schedule (Peste et al., NeurIPS 2021, section 4). The unit is the epoch, epochs
count from 0, and spans are half-open: a phase holds for the epochs start, start + 1, ..., end - 1.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Literal, get_args

Kind = Literal["dense", "sparse"]

_GRAMMAR = 'phases like "dense 10, (sparse 5, dense 5) x6, sparse 15", lengths in whole epochs, 1 or more'
_MAX_PHASES, _MAX_DEPTH = 10_000, 20  # a slip of the finger must not fill the memory
_TOKEN = re.compile(r"[A-Za-z]+|\d+(?:\.\d+)?|[(),]|(?P<other>\S)")


@dataclass(frozen=True)
class Phase:
    """A span of epochs, start inclusive and end exclusive, in which the network is dense or sparse."""

    kind: Kind
    start: int
    end: int

    @property
    def num_epochs(self) -> int:
        return self.end - self.start

    def __str__(self) -> str:
        epochs = f"epoch {self.start}" if self.num_epochs == 1 else f"epochs {self.start}-{self.end - 1}"
        return f"{self.kind}, {epochs}"


@dataclass(frozen=True)
class PhaseSchedule:
    """Alternating dense (decompressed) and sparse (compressed) phases: pairs of kind and epochs.

    Neighbours of one kind are one phase: "dense 2, dense 3" equals "dense 5".
    """

    spans: tuple[tuple[Kind, int], ...]

    def __post_init__(self) -> None:
        if not self.spans:
            raise ValueError(f"a phase schedule needs at least one phase; write {_GRAMMAR}")
        for kind, length in self.spans:
            if kind not in get_args(Kind):
                raise ValueError(f"unknown phase {kind!r}; a phase is dense or sparse")
            if length < 1:
                raise ValueError(f"phase {kind!r} of {length} epochs; a phase lasts 1 epoch or more")
        neighbours = groupby(self.spans, key=lambda span: span[0])
        merged = tuple((kind, sum(length for _, length in spans)) for kind, spans in neighbours)
        object.__setattr__(self, "spans", merged)

    @classmethod
    def parse(cls, text: str) -> PhaseSchedule:
        """Read the text form. Raises ValueError that shows the place in the text where it went wrong."""
        return cls(tuple(_Parser(text).schedule()))

    @cached_property
    def phases(self) -> tuple[Phase, ...]:
        phases, start = [], 0
        for kind, length in self.spans:
            phases.append(Phase(kind, start, start + length))
            start += length
        return tuple(phases)

    @property
    def num_epochs(self) -> int:
        return self.phases[-1].end

    @property
    def num_sparse(self) -> int:
        """Epochs in sparse phases."""
        return sum(length for kind, length in self.spans if kind == "sparse")

    def time_share(self, sparse_cost: float) -> float:
        """Of dense training's time, where an epoch of a sparse phase takes `sparse_cost` of a dense one's."""
        return 1 - self.num_sparse / self.num_epochs * (1 - sparse_cost)

    def phase_at(self, epoch: int) -> Phase:
        """The phase in force in `epoch`. Raises ValueError outside 0 .. num_epochs - 1."""
        for phase in self.phases:
            if phase.start <= epoch < phase.end:
                return phase
        raise ValueError(f"epoch {epoch} is outside the schedule's epochs 0-{self.num_epochs - 1}")

    @property
    def compressions(self) -> tuple[int, ...]:
        """Epochs at whose beginning masks are chosen."""
        return tuple(phase.start for phase in self.phases if phase.kind == "sparse")

    @property
    def decompressions(self) -> tuple[int, ...]:
        """Epochs at whose beginning all weights are restored."""
        return tuple(phase.start for phase in self.phases[1:] if phase.kind == "dense")

    def last(self, kind: Kind) -> Phase | None:
        """The last phase of a kind: the dense twin is taken at the end of last("dense"), the sparse model
        at the end of last("sparse")."""
        return next((phase for phase in reversed(self.phases) if phase.kind == kind), None)

    def scaled(self, num_epochs: int) -> PhaseSchedule:
        """The same phases over another number of epochs, 1 or more: lengths in proportion, each 1 at least.
        Of more phases than epochs the first ones are left, and the last."""
        spans = self.spans
        if len(spans) > num_epochs:
            spans = (*spans[: num_epochs - 1], spans[-1])
        total = sum(length for _, length in spans)
        scaled, before, start = [], 0, 0
        for left, (kind, length) in zip(reversed(range(len(spans))), spans, strict=True):
            before += length
            end = min(max(round(num_epochs * before / total), start + 1), num_epochs - left)
            scaled.append((kind, end - start))
            start = end
        return PhaseSchedule(tuple(scaled))

    def __str__(self) -> str:
        """The shortest text with one level of "( ) xN" for pairs of phases; parse(str(s)) == s."""
        parts, i = [], 0
        while i < len(self.spans):
            pair, repeats = self.spans[i : i + 2], 1
            while len(pair) == 2 and self.spans[i + 2 * repeats : i + 2 * repeats + 2] == pair:
                repeats += 1
            if repeats > 1:
                parts.append(f"({', '.join(f'{kind} {length}' for kind, length in pair)}) x{repeats}")
                i += 2 * repeats
            else:
                parts.append("{} {}".format(*self.spans[i]))
                i += 1
        return ", ".join(parts)


class _Parser:
    """Recursive descent: schedule = item {"," item}; item = kind number | "(" schedule ")" "x" number."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0
        self.tokens: list[tuple[str, int]] = []
        for match in _TOKEN.finditer(text):
            if match["other"]:
                raise self.error(f"unexpected {match['other']!r}", match.start())
            self.tokens.append((match.group(), match.start()))
        self.tokens.append(("", len(text.rstrip())))  # the end

    def error(self, what: str, position: int) -> ValueError:
        return ValueError(
            f"{what} in the phase schedule\n    {self.text}\n    {' ' * position}^\nexpected {_GRAMMAR}"
        )

    def peek(self) -> str:
        return self.tokens[self.at][0]

    def fail(self, wanted: str) -> ValueError:
        found, position = self.tokens[self.at]
        return self.error(f"{wanted} expected, {repr(found) if found else 'the end'} found", position)

    def take(self, token: str) -> None:
        if self.peek() != token:
            raise self.fail(repr(token))
        self.at += 1

    def number(self) -> int:
        if not self.peek().isdigit() or int(self.peek()) < 1:
            raise self.fail("a whole number of 1 or more")
        self.at += 1
        return int(self.tokens[self.at - 1][0])

    def schedule(self, depth: int = 0) -> list[tuple[Kind, int]]:
        spans = self.item(depth)
        while self.peek() == ",":
            self.at += 1
            spans += self.item(depth)
        if depth == 0 and self.peek():
            raise self.fail("','")
        return spans

    def item(self, depth: int) -> list[tuple[Kind, int]]:
        token = self.peek()
        if token == "(" and depth < _MAX_DEPTH:
            self.at += 1
            inner = self.schedule(depth + 1)
            self.take(")")
            self.take("x")
            repeats = self.number()
            if len(inner) * repeats > _MAX_PHASES:
                self.at -= 1
                raise self.fail(f"a schedule of at most {_MAX_PHASES} phases")
            return inner * repeats
        for kind in get_args(Kind):
            if token == kind:
                self.at += 1
                return [(kind, self.number())]
        raise self.fail("'dense', 'sparse' or '('")
