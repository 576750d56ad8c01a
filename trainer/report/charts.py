"""Charts as SVG: lines over epochs with sparse phases shaded. No library: what is drawn is little, and a page
has to open without a network, print, and follow the reader's colours, which style.css gives by class.

Lengths are in units of a view, which the page scales to the reader's window. hover.js shows the values at the
pointer, from the numbers that stand beside the drawing.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from matplotlib.ticker import MaxNLocator

LEFT, RIGHT, TOP, BOTTOM = 50, 10, 10, 26  # room around the plot, for what stands at its axes


@dataclass(frozen=True)
class Series:
    """points: (x, y), finite or left out. kind: a class of style.css for its colour. marks: "line", "dots",
    "star", or "steps": y holds from x - 1 to x. down: drawn below 0, for what is lost; y is positive. title:
    in the legend and at the pointer."""

    title: str
    points: Sequence[tuple[float, float | None]]
    kind: str
    marks: str = "line"
    down: bool = False

    @property
    def drawn(self) -> list[tuple[float, float]]:
        return [(x, y) for x, y in self.points if y is not None and math.isfinite(y)]


@dataclass(frozen=True)
class View:
    """Of a drawing whose plot has x from 0 to `last`, y from `low` to `high`."""

    kind: str  # a class of style.css
    width: int
    height: int
    last: float
    low: float
    high: float

    def at_x(self, x: float) -> float:
        return LEFT + (self.width - LEFT - RIGHT) * x / self.last

    def at_y(self, y: float) -> float:
        share = (y - self.low) / (self.high - self.low)
        return self.height - BOTTOM - (self.height - TOP - BOTTOM) * share


def chart(
    title: str,
    series: Sequence[Series],
    last: float,
    shaded: Sequence[tuple[float, float]] = (),
    wide: int = 0,
    from_zero: bool = False,
    legend: bool = True,
) -> str:
    """A figure of the series over x from 0 to `last`; `shaded`: spans of x. wide: height of a drawing over
    the whole page, for windows that have room; a smaller one is for those that have not. legend: where there
    is more than one series to tell apart. Empty without any point."""
    series = [each for each in series if each.drawn]
    values = [-y if each.down else y for each in series for _, y in each.drawn]
    if not values:
        return ""
    values += [0.0] if from_zero else []
    y_ticks = _ticks(min(values), max(values))
    bounds = (last, y_ticks[0], y_ticks[-1])
    views = [View("narrow", 440, 240, *bounds)]
    if wide:
        views.insert(0, View("wide", 920, wide, *bounds))
    label = html.escape(f"{title}: {', '.join(each.title for each in series)}")
    drawings = "".join(_drawing(view, label, series, y_ticks, shaded) for view in views)
    keys = [(f"{each.kind} {each.marks}", each.title) for each in series]
    if wide and shaded:
        keys.append(("sparse", "sparse phase"))
    spans = "".join(f'<span class="{kind}">{html.escape(text)}</span>' for kind, text in keys)
    shown = f"<div class=legend>{spans}</div>" if legend and keys[1:] else ""
    return (
        f'<figure class="{views[0].kind}"><figcaption>{html.escape(title)}</figcaption>{shown}{drawings}'
        f"<output></output>{_numbers(series, last, shaded)}</figure>"
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


def _drawing(
    view: View,
    label: str,
    series: Sequence[Series],
    y_ticks: Sequence[float],
    shaded: Sequence[tuple[float, float]],
) -> str:
    right, bottom = view.width - RIGHT, view.height - BOTTOM
    parts = [
        f'<rect class="sparse" x="{view.at_x(begin):.1f}" y="{TOP}" '
        f'width="{view.at_x(end) - view.at_x(begin):.1f}" height="{bottom - TOP}"/>'
        for begin, end in shaded
    ]
    both_ways = any(each.down for each in series)
    for y in y_ticks:
        kind = "zero" if both_ways and y == 0 else "grid"
        parts.append(f'<path class="{kind}" d="M{LEFT} {view.at_y(y):.1f}H{right}"/>')
        text = number(abs(y) if both_ways else y)
        parts.append(f'<text class="y" x="{LEFT - 7}" y="{view.at_y(y) + 4:.1f}">{text}</text>')
    count = f"{number(view.last)} epoch{'s' if view.last > 1 else ''}"  # the last tick says what they count
    for x in _ticks(0, view.last, whole=True):
        if view.at_x(x) < right - 8 * len(count) - 14:
            parts.append(f'<text class="x" x="{view.at_x(x):.1f}" y="{bottom + 18}">{number(x)}</text>')
    parts.append(f'<text class="last" x="{right}" y="{bottom + 18}">{count}</text>')
    parts += [_marks(each, view) for each in series]
    return (
        f'<svg class="{view.kind}" viewBox="0 0 {view.width} {view.height}" role="img" aria-label="{label}" '
        f'data-left="{LEFT}" data-right="{RIGHT}">{"".join(parts)}'
        f'<path class="pointer" d="M0 {TOP}V{bottom}"/></svg>'
    )


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


def _marks(series: Series, view: View) -> str:
    drawn, kind = series.drawn, series.kind
    if series.down:
        drawn = [(x, -y) for x, y in drawn]
    if series.marks == "steps":
        drawn = [corner for x, y in drawn for corner in ((x - 1, y), (x, y))]
    places = [(view.at_x(x), view.at_y(y)) for x, y in drawn]
    if series.marks in ("line", "steps"):
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        return f'<path class="line {kind}" d="M{path}"/>'
    if series.marks == "star":
        return "".join(f'<text class="star {kind}" x="{x:.1f}" y="{y + 8:.1f}">★</text>' for x, y in places)
    size = 3.5 if len(places) < 40 else 2.5
    return "".join(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{size}"/>' for x, y in places)


def _numbers(series: Sequence[Series], last: float, shaded: Sequence[tuple[float, float]]) -> str:
    """What hover.js reads: of each x that has values, which series have them, and their text."""
    rows: dict[float, list[tuple[int, str]]] = {}
    for place, each in enumerate(series):
        for x, y in each.drawn:
            rows.setdefault(round(x, 3), []).append((place, number(y)))
    data = {
        "last": last,
        "shaded": shaded,
        "series": [(each.title, f"{each.kind} {each.marks}") for each in series],
        "rows": [(x, number(x), rows[x]) for x in sorted(rows)],
    }
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json">{text}</script>'
