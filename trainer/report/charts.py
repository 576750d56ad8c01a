"""Charts as SVG: lines over epochs with sparse phases shaded. No library: what is drawn is little, and a page
has to open without a network, print, and follow the reader's colours, which style.css gives by class.

Lengths are in units of the view, WIDTH wide; the page scales it to the reader's window. hover.js shows the
values at the pointer, from the numbers that stand beside the drawing.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from matplotlib.ticker import MaxNLocator

WIDTH, HEIGHT = 720, 260
LEFT, RIGHT, TOP, BOTTOM = 64, 12, 12, 34


@dataclass(frozen=True)
class Series:
    """points: (x, y), finite or left out. kind: a class of style.css for its colour. marks: "line", "dots",
    "star", or "steps": y holds from x - 1 to x. title: in the legend and at the pointer."""

    title: str
    points: Sequence[tuple[float, float | None]]
    kind: str
    marks: str = "line"

    @property
    def drawn(self) -> list[tuple[float, float]]:
        return [(x, y) for x, y in self.points if y is not None and math.isfinite(y)]


def chart(
    title: str, series: Sequence[Series], last: float, shaded: Sequence[tuple[float, float]] = ()
) -> str:
    """A figure of the series over x from 0 to `last`; `shaded`: spans of x. Empty without any point."""
    values = [y for each in series for _, y in each.drawn]
    if not values:
        return ""
    y_ticks = _ticks(min(values), max(values))
    low, high = y_ticks[0], y_ticks[-1]

    def at_x(x: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * x / last

    def at_y(y: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (y - low) / (high - low)

    parts = [
        f'<rect class="sparse" x="{at_x(begin):.1f}" y="{TOP}" width="{at_x(end) - at_x(begin):.1f}" '
        f'height="{HEIGHT - TOP - BOTTOM}"/>'
        for begin, end in shaded
    ]
    for y in y_ticks:
        parts.append(f'<path class="grid" d="M{LEFT} {at_y(y):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="y" x="{LEFT - 8}" y="{at_y(y) + 4:.1f}">{number(y)}</text>')
    for x in (x for x in _ticks(0, last, whole=True) if x <= last):
        parts.append(f'<text class="x" x="{at_x(x):.1f}" y="{HEIGHT - BOTTOM + 20}">{number(x)}</text>')
    for each in series:
        drawn = _corners(each.drawn) if each.marks == "steps" else each.drawn
        parts.append(_marks(each, [(at_x(x), at_y(y)) for x, y in drawn]))
    label = f"{title}: " + ", ".join(each.title for each in series if each.drawn)
    drawing = (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(label)}">'
        f'{"".join(parts)}<path class="pointer" d="M0 {TOP}V{HEIGHT - BOTTOM}"/></svg>'
    )
    legend = "".join(
        f'<span class="{each.kind} {each.marks}">{html.escape(each.title)}</span>'
        for each in series
        if each.drawn
    )
    if shaded:
        legend += '<span class="sparse">sparse phase</span>'
    return (
        f"<figure><figcaption>{html.escape(title)}</figcaption><div class=legend>{legend}</div>{drawing}"
        f"<output></output>{_numbers(series, at_x)}</figure>"
    )


def phases(kinds: Sequence[str]) -> list[tuple[float, float]]:
    """Spans of sparse phases, from the phase of each epoch."""
    spans, begin = [], 0
    for kind, those in groupby(kinds):
        end = begin + len(list(those))
        spans += [(float(begin), float(end))] if kind == "sparse" else []
        begin = end
    return spans


def number(value: float) -> str:
    """Short, for people: 12,345, 0.9, 1e-05."""
    if value == 0 or 1e-4 <= abs(value) < 1e6:
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:.3g}"


def _ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """Round values of which the first and last enclose both."""
    locator = MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10], integer=whole, min_n_ticks=2)
    ticks = [float(tick) for tick in locator.tick_values(low, high)]
    # one that lies outside is enough on each side
    while len(ticks) > 2 and ticks[1] <= low:
        del ticks[0]
    while len(ticks) > 2 and ticks[-2] >= high:
        del ticks[-1]
    return ticks if ticks[0] < ticks[-1] else [ticks[0], ticks[0] + 1]


def _corners(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [corner for x, y in points for corner in ((x - 1, y), (x, y))]


def _marks(series: Series, places: Sequence[tuple[float, float]]) -> str:
    if series.marks in ("line", "steps"):
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        return f'<path class="line {series.kind}" d="M{path}"/>' if places else ""
    if series.marks == "star":
        return "".join(
            f'<text class="star {series.kind}" x="{x:.1f}" y="{y + 9:.1f}">★</text>' for x, y in places
        )
    return "".join(f'<circle class="{series.kind}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>' for x, y in places)


def _numbers(series: Sequence[Series], at_x: Any) -> str:
    """What hover.js reads: each x that has values, its place and the lines to show."""
    rows: dict[float, list[str]] = {}
    for each in series:
        for x, y in each.drawn:
            rows.setdefault(x, []).append(f"{each.title}: {number(y)}")
    data = [[round(at_x(x), 1), [f"epochs done: {number(x)}", *rows[x]]] for x in sorted(rows)]
    return f'<script type="application/json">{json.dumps(data).replace("<", chr(92) + "u003c")}</script>'
