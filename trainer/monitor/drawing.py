"""A recipe's schedule in text: phases, learning rate and sparsity over the epochs, by block characters."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from sparsity.schedule import Phase, PhaseSchedule
from trainer.config.schema import Config
from trainer.optim.rates import learning_rate

WIDTH = 80  # columns, of a terminal as it comes
_LABEL = 10  # columns before a drawing
_RATES, _SPARSITY = 5, 3  # rows high
_DENSE, _SPARSE, _BOTH = "░", "█", "▒"
_EIGHTHS = " ▁▂▃▄▅▆▇█"
_ASCII = str.maketrans({_DENSE: ".", _BOTH: "+", **dict(zip(_EIGHTHS, " ..::==##", strict=True))})
_CELL = 20  # columns of a phase in the table of phases
_ROWS = 5  # that the table has at the most before it gets another column


def draw_schedule(config: Config, steps_per_epoch: int) -> list[str]:
    """Lines of at most 80 columns. steps_per_epoch: optimizer steps, which rates by steps go by. A moment in
    a run is the number of epochs that lie behind it: a phase's end is the next one's beginning."""
    schedule = config.sparsity.build_schedule()
    columns = _columns(config.epochs, WIDTH - _LABEL)
    kinds = [{schedule.phase_at(epoch).kind for epoch, _ in column} for column in columns]
    marks = [_BOTH if len(kind) > 1 else _SPARSE if kind == {"sparse"} else _DENSE for kind in kinds]

    def rate(epoch: int, part: float) -> float:
        clock = epoch, config.epochs, int(part * steps_per_epoch), steps_per_epoch
        return learning_rate(config.lr, config.optimizer.lr, *clock)

    rates = [max(rate(*moment) for moment in column) for column in columns]
    asked = sparsity_asked(config)
    sparsity = [max(asked[epoch] for epoch, _ in column) for column in columns]
    both = f", {_BOTH} both" if _BOTH in marks else ""
    lines = [
        f"{'phase':{_LABEL}}{''.join(marks)}",
        f"{'':{_LABEL}}{_DENSE} dense, {_SPARSE} sparse{both}: "
        f"{schedule.num_sparse} of {schedule.num_epochs} epochs are sparse",
        *_bars("lr", rates, "{:.4g}".format, _RATES),
        *_bars("sparsity", sparsity, lambda share: f"{100 * share:.4g} %", _SPARSITY),
        f"{'epoch':{_LABEL}}{_axis(schedule, len(columns))}",
    ]
    return [line.rstrip() for line in lines]


def sparsity_asked(config: Config) -> list[float]:
    """What the recipe asks for in each epoch, over the layers that it prunes."""
    actions, asked = config.sparsity.build_actions(), [0.0]
    for epoch in range(config.epochs):
        now = getattr(actions[epoch], "sparsity", 0.0) if epoch in actions else asked[-1]
        asked.append(float(now))
    return asked[1:]


def phase_table(config: Config) -> list[str]:
    """Every phase with its epochs, counted from 1 as a run's lines count them, in as few lines as fit into 80
    columns; of more than 20 the first ones."""
    phases, asked = config.sparsity.build_schedule().phases, sparsity_asked(config)
    shown = [_cell(asked, phase) for phase in phases[: _ROWS * (WIDTH // _CELL)]]
    rows = math.ceil(len(shown) / math.ceil(len(shown) / _ROWS))  # columns of one length, as far as it goes
    if len(phases) > len(shown):
        shown[-1] = f"{len(phases) - len(shown) + 1} more phases"
    return ["".join(f"{cell:{_CELL}}" for cell in shown[row::rows]).rstrip() for row in range(rows)]


def _cell(asked: Sequence[float], phase: Phase) -> str:
    epochs = f"{phase.start + 1}" if phase.num_epochs == 1 else f"{phase.start + 1}-{phase.end}"
    if phase.kind == "dense":
        return f"{epochs:>7} dense"
    return f"{epochs:>7} sparse {100 * asked[phase.end - 1]:.3g} %"


def for_encoding(text: str, encoding: str | None) -> str:
    """The text, in plain ASCII where an output cannot show the blocks."""
    try:
        text.encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return text.translate(_ASCII)
    return text


def _columns(num_epochs: int, width: int) -> list[list[tuple[int, float]]]:
    """For every column the moments that it shows: epoch, and the part of it that is over. Up to `width`
    epochs each have as many columns as the others, more of them share columns."""
    if num_epochs <= width:
        each = width // num_epochs
        return [[(epoch, part / each)] for epoch in range(num_epochs) for part in range(each)]
    edges = [column * num_epochs // width for column in range(width + 1)]
    return [[(epoch, 0.0) for epoch in range(*edges[column : column + 2])] for column in range(width)]


def _bars(name: str, values: Sequence[float], label: Callable[[float], str], rows: int) -> list[str]:
    """A bar for each value, from 0 up to the greatest. Nothing where all are 0."""
    most = max(values)
    if most == 0:
        return []
    heights = [max(round(8 * rows * value / most), value > 0) for value in values]
    labels = {rows - 1: label(most), rows // 2: name, 0: "0"}
    return [
        f"{labels.get(row, ''):{_LABEL}}{''.join(_EIGHTHS[min(max(h - 8 * row, 0), 8)] for h in heights)}"
        for row in reversed(range(rows))
    ]


def _axis(schedule: PhaseSchedule, width: int) -> str:
    """Where phases begin and end, as far as there is room."""
    line, free = "", 0
    end = str(schedule.num_epochs)
    last = width - len(end)
    for phase in schedule.phases:
        at = phase.start * width // schedule.num_epochs
        text = str(phase.start)
        if at >= free and at + len(text) < last:
            line = f"{line:{at}}{text}"
            free = at + len(text) + 1
    return f"{line:{max(last, 0)}}{end}"
