"""A run's progress in one line that fits its terminal, however narrow: what matters least is left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from rich.console import Console
from rich.live import Live
from rich.text import Text

_LEAST, _MOST = 6, 40  # columns of the bar itself
_NEEDED = 2  # parts of this rank and below go before the bar
_GAP = "  "


class Part(NamedTuple):
    """rank: parts of a greater one are left out first."""

    rank: int
    text: str


def fit(parts: Sequence[Part], width: int) -> str:
    """The parts in their order, as many as fit into `width` columns; the last one left is cut."""
    kept = [part for part in parts if part.text]
    while len(kept) > 1 and len(_GAP.join(part.text for part in kept)) > width:
        kept.remove(max(reversed(kept), key=lambda part: part.rank))
    return _GAP.join(part.text for part in kept)[: max(width, 0)]


def bar_line(share: float, parts: Sequence[Part], width: int, ascii_only: bool = False) -> Text:
    """One line of at most `width` columns. share: of the whole, 0 to 1. The bar gets what parts leave, and is
    left out where there is too little room for it beside those that matter."""
    room = width - _LEAST - len(_GAP)
    text = fit(parts, room)
    columns = min(_MOST, width - len(_GAP) - len(text))
    if len(fit([part for part in parts if part.rank <= _NEEDED], width)) > room:
        return Text(fit(parts, width), no_wrap=True, overflow="crop")
    full = min(columns, int(columns * share))
    done, left = ("#", "-") if ascii_only else ("━", "─")
    line = Text(no_wrap=True, overflow="crop")
    line.append(done * full, style="bar.complete").append(left * (columns - full), style="bar.back")
    return line.append(_GAP + text)


def start_bar(console: Console, now: Callable[[], tuple[float, Sequence[Part]]]) -> Live:
    """On a terminal, below all that is printed, drawn again four times a second until its stop(). now: share
    and parts to draw."""

    def draw() -> Text:
        options = console.options
        return bar_line(*now(), options.max_width, options.ascii_only)

    live = Live(console=console, get_renderable=draw, refresh_per_second=4)
    live.start()
    return live
