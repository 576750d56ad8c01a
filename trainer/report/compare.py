"""Several runs on one page: a table, their curves over each other, and where their recipes differ."""

from __future__ import annotations

import html
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.atomic import write_text
from trainer.checkpoints.run_dir import DENSE_TWIN, SPARSE, RunDir
from trainer.report.charts import Series, chart, phases
from trainer.report.cost import duration
from trainer.report.page import grid, note, page, section, table
from trainer.report.records import epoch_records, points, rates, recipe_of

KINDS = ("dense", "kept", "third", "fourth", "fifth", "sixth")  # colours, again from the first after six
COLUMNS = ("run", "dense, %", "sparse, %", "difference", "sparsity, %", "FLOPs, of dense", "time")
Record = dict[str, Any]


def write_comparison(runs: Sequence[RunDir], path: Path) -> None:
    """Raises ValueError for a run without a finished epoch, OSError where it cannot be written."""
    names, records = _names(runs), [run.read_metrics() for run in runs]
    epochs = [epoch_records(run, each) for run, each in zip(runs, records, strict=True)]
    kinds = [KINDS[place % len(KINDS)] + " again" * (place >= len(KINDS)) for place in range(len(epochs))]
    last = max(each[-1]["epoch"] + 1 for each in epochs)
    spans = [phases([record["phase"] for record in each]) for each in epochs]
    shaded = spans[0] if all(each == spans[0] for each in spans) else []

    def curves(key: str, times: float = 1, marks: str = "line") -> list[Series]:
        given = zip(names, epochs, kinds, strict=True)
        return [Series(name, points(each, key, times), kind, marks) for name, each, kind in given]

    learning = []
    for run, name, each, kind in zip(runs, names, records, kinds, strict=True):
        given, marks = rates(each, recipe_of(run))
        learning.append(Series(name, given, kind, marks))
    small = [
        chart(title, series, last, shaded, legend=False, from_zero=from_zero)
        for title, series, from_zero in (
            ("test loss", curves("val_loss"), False),
            ("training loss", curves("train_loss"), False),
            ("sparsity, %", curves("sparsity", 100, "steps"), True),
            ("learning rate", learning, True),
            ("throughput, images/s", curves("images_per_second"), True),
            ("waiting for data, % of the time", curves("data_wait", 100), True),
        )
    ]
    rows = [(name, *_row(run, each)) for name, run, each in zip(names, runs, epochs, strict=True)]
    body = [
        f"<header><h1>{len(runs)} runs</h1>{note('their curves over each other, and what differs')}</header>",
        section("Results", table(COLUMNS, rows, kinds=kinds), _links(runs, names, path)),
        section("Accuracy", chart("test top-1, %", curves("val_top1"), last, shaded, wide=320)),
        section("Training", grid(*small)),
        section("Where their recipes differ", _differences(runs, names)),
    ]
    write_text(path, page(", ".join(names), body))


def _names(runs: Sequence[RunDir]) -> list[str]:
    """Short ones, where they tell the runs apart."""
    short = [f"{run.path.parent.name} {run.path.name}" for run in runs]
    return short if len(set(short)) == len(short) else [str(run.path) for run in runs]


def _row(run: RunDir, epochs: Sequence[Record]) -> tuple[str, ...]:
    seconds = epochs[-1].get("seconds")
    time = duration(seconds) if seconds else "-"
    result = run.read_result()
    if result is None:
        done = epochs[-1]["epoch"] + 1
        return (*["-"] * 4, f"not finished: {done} epochs", time)
    dense, sparse = result.get(DENSE_TWIN), result.get(SPARSE)
    ratio = (result.get("flops") or {}).get("training_ratio")
    return (
        f"{dense['top1']:.2f}" if dense else "-",
        f"{sparse['top1']:.2f}" if sparse else "-",
        f"{sparse['top1'] - dense['top1']:+.2f}".replace("-", "\u2212") if dense and sparse else "-",
        f"{100 * sparse['sparsity']:.2f}" if sparse else "-",
        f"{ratio:.3f}" if ratio else "-",
        time,
    )


def _links(runs: Sequence[RunDir], names: Sequence[str], path: Path) -> str:
    """To the runs' own pages, as far as they have one."""
    here = path.resolve().parent
    links = [
        f'<a href="{html.escape(os.path.relpath(run.report.resolve(), here))}">{html.escape(name)}</a>'
        for run, name in zip(runs, names, strict=True)
        if run.report.exists()
    ]
    return f"<p class=soft>Their pages: {', '.join(links)}</p>" if links else ""


def _differences(runs: Sequence[RunDir], names: Sequence[str]) -> str:
    recipes = [recipe_of(run) for run in runs]
    keys = list(dict.fromkeys(key for recipe in recipes for key in recipe))
    missing: Any = object()
    rows = [
        (key, *(str(recipe.get(key, "-")) for recipe in recipes))
        for key in keys
        if any(recipe.get(key, missing) != recipes[0].get(key, missing) for recipe in recipes)
    ]
    if not rows:
        return note("Their recipes are the same.")
    return table(("", *names), rows, texts=range(len(runs) + 1))
