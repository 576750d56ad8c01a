"""Tables and pictures, from the records alone."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks.accuracy.runs import CURVE, runs_of
from benchmarks.accuracy.tables import TABLES, Row

# Rows that others are compared with, seed by seed
BASE = {"main": "dense", "ablations": "as_it_is", "quickstart": "fp32_masked"}
COLUMNS = ("method", "n", "sparsity", "top-1 %", "difference", "dense twin", "fine-tuned", "FLOPs", "hours")
COLORS = ("#1f5f99", "#c8590a")
SHADE = "#f3e3c8"


@dataclass(frozen=True)
class Found:
    """A row with its records by seed."""

    row: Row
    records: dict[int, dict[str, Any]]

    def final(self) -> dict[int, float]:
        """Seed -> top-1 in percent of the sparse model, or of the dense one where there is no other."""
        return {seed: _final(record["result"])["top1"] for seed, record in self.records.items()}

    def of(self, model: str) -> list[float]:
        found = (record["result"].get(model) for record in self.records.values())
        return [each["top1"] for each in found if each is not None]


def read(table: str, results: Path) -> list[Found]:
    """All rows of the table, in its order, with the records that there are."""
    found = {row.name: Found(row, {}) for row in TABLES[table]}
    for run in runs_of(table):
        if (record := run.read(results)) is not None:
            found[run.row.name].records[run.seed] = record
    return list(found.values())


def lines(table: str, found: Sequence[Found]) -> list[tuple[str, ...]]:
    """A line of COLUMNS for each row that has records. Mean and standard deviation over seeds; differences
    are paired by seed, mean and standard error; FLOPs of training as a share of as many dense epochs', and
    hours, both with the training that a row starts from."""
    by_name = {each.row.name: each for each in found}
    base = next((each.final() for each in found if each.row.name == BASE.get(table)), {})
    befores = [by_name[each.row.after].records if each.row.after else None for each in found]
    return [_line(each, base, before) for each, before in zip(found, befores, strict=True) if each.records]


def _line(found: Found, base: dict[int, float], before: dict[int, Any] | None) -> tuple[str, ...]:
    final, results = found.final(), [record["result"] for record in found.records.values()]
    pairs = [final[seed] - base[seed] for seed in final if seed in base]
    is_base = final == {seed: base.get(seed) for seed in final}
    costs = _costs(found.records, before)
    return (
        found.row.title,
        str(len(final)),
        f"{100 * _final(results[0])['sparsity']:.1f} %" if results[0]["sparse"] else "",
        show(list(final.values())),
        "" if is_base or not pairs else show(pairs, "+", error=True),
        show(found.of("dense_twin")) if results[0]["sparse"] else "",
        show(found.of("finetuned_dense")),
        f"{statistics.mean(share for share, _ in costs):.2f}" if costs else "",
        f"{statistics.mean(hours for _, hours in costs):.2f}" if costs else "",
    )


def _costs(records: dict[int, Any], before: dict[int, Any] | None) -> list[tuple[float, float]]:
    """(FLOPs as a share, hours) by seed. before: records of what they start from, None where that is nothing;
    one whose own beginning has no record is left out."""
    costs = []
    for seed, record in records.items():
        parts = (
            [record["result"]] if before is None else [record["result"], before.get(seed, {}).get("result")]
        )
        if None not in parts:
            flops = [part["flops"] for part in parts]
            dense = sum(each["training"] / each["training_ratio"] for each in flops)
            hours = sum(part["seconds"] for part in parts) / 3600
            costs.append((sum(each["training"] for each in flops) / dense, hours))
    return costs


def _final(result: dict[str, Any]) -> dict[str, Any]:
    return dict(result["sparse"] or result["dense_twin"])


def show(values: Sequence[float], sign: str = "", error: bool = False) -> str:
    """ "90.12 ± 0.13": mean, and standard deviation or error; of one value, itself. sign: "+" for gains."""
    if len(values) < 2:
        return f"{values[0]:{sign}.2f}" if values else ""
    deviation = statistics.stdev(values) / (math.sqrt(len(values)) if error else 1)
    return f"{statistics.mean(values):{sign}.2f} ± {deviation:.2f}"


def markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table in a document; columns without any entry are left out."""
    kept = [place for place in range(len(COLUMNS)) if any(row[place] for row in rows)]
    cells = [[row[place] for place in kept] for row in (COLUMNS, ["---"] * len(COLUMNS), *rows)]
    return [f"| {' | '.join(row)} |" for row in cells]


def draw(table: str, found: Sequence[Found], path: Path) -> None:
    """The table's picture; the format is the suffix's."""
    drawers = {"main": _over_density, "memorisation": _over_epochs, "compute": _over_compute}
    if (drawer := drawers.get(table)) is None or not (found := [each for each in found if each.records]):
        return
    figure = Figure(figsize=(8, 4))
    drawer(figure, found)
    with rc_context({"svg.hashsalt": table}):  # the same records, the same file
        figure.savefig(path, bbox_inches="tight", metadata={"Date": None})


def _over_density(figure: Figure, found: Sequence[Found]) -> None:
    """Kept weights from many to few, by factors; methods a little apart, so that none hides another."""
    axes = figure.subplots()
    methods: dict[str, list[Found]] = {}
    for each in found:
        if each.row.name == "dense":
            mean, error = _mean_and_deviation(each)
            axes.axhline(mean, color="black", linestyle="--", linewidth=1, label="dense")
            axes.axhspan(mean - error, mean + error, color="black", alpha=0.08, linewidth=0)
        elif each.row.name != "dense_12":
            methods.setdefault(re.sub(r" \d+ %$", "", each.row.title), []).append(each)
    ticks = set()
    for place, (method, rows) in enumerate(methods.items()):
        kept = [100 - 100 * _final(next(iter(row.records.values()))["result"])["sparsity"] for row in rows]
        means, errors = zip(*map(_mean_and_deviation, rows), strict=True)
        apart = 1 + 0.03 * (place - len(methods) / 2)
        at, color = [apart * share for share in kept], f"C{place}"
        axes.errorbar(at, means, errors, fmt="o-", color=color, capsize=3, markersize=5, label=method)
        ticks |= {round(share) for share in kept}
    axes.set_xscale("log")
    axes.set_xticks(sorted(ticks), [f"{tick} %" for tick in sorted(ticks)])
    axes.set_xticks([], minor=True)
    axes.invert_xaxis()
    axes.set_xlabel("weights kept")
    axes.set_ylabel("test top-1, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))


def _mean_and_deviation(found: Found) -> tuple[float, float]:
    tops = list(found.final().values())
    return statistics.mean(tops), statistics.stdev(tops) if len(tops) > 1 else 0.0


def _over_epochs(figure: Figure, found: Sequence[Found]) -> None:
    phase, random, true = (CURVE.index(key) for key in ("phase", "memorised_top1", "memorised_true_top1"))
    for axes, each in zip(figure.subplots(1, len(found), sharey=True, squeeze=False)[0], found, strict=True):
        rows = next(iter(each.records.values()))["curve"]
        epochs = range(1, len(rows) + 1)
        axes.plot(epochs, [row[random] for row in rows], color=COLORS[1], label="random labels")
        axes.plot(epochs, [row[true] for row in rows], color=COLORS[0], label="true labels")
        for epoch, row in zip(epochs, rows, strict=True):
            if row[phase] == "sparse":
                axes.axvspan(epoch - 1, epoch, color=SHADE, zorder=0, linewidth=0)
        axes.set_title(each.row.title)
        axes.set_xlabel("epochs done")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("top-1 on relabelled images, %")
    figure.axes[0].legend()


def _over_compute(figure: Figure, found: Sequence[Found]) -> None:
    costs_by: dict[str, Callable[[dict[str, Any]], float]] = {
        "FLOPs of training, 10^15": lambda result: result["flops"]["training"] / 1e15,
        "hours": lambda result: result["seconds"] / 3600,
    }
    for axes, (title, cost) in zip(figure.subplots(1, 2, sharey=True), costs_by.items(), strict=True):
        for color, recipe in zip(COLORS, ("dense", "acdc"), strict=False):
            rows = [each for each in found if each.row.recipe == recipe]
            costs = [statistics.mean(cost(r["result"]) for r in row.records.values()) for row in rows]
            tops = [statistics.mean(row.final().values()) for row in rows]
            axes.plot(costs, tops, "o-", color=color, label=recipe)
        axes.set_xlabel(title)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("test top-1, %")
    figure.axes[0].legend()
