"""Several runs on one page: a table, their curves over each other, and where their recipes differ."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.atomic import write_text
from trainer.checkpoints.run_dir import DENSE_TWIN, SPARSE, RunDir
from trainer.report.charts import Series, chart
from trainer.report.page import page, table
from trainer.report.records import epoch_records, recipe_of

KINDS = ("dense", "kept", "third", "fourth", "fifth", "sixth")  # colours, again from the first after six


def write_comparison(runs: Sequence[RunDir], path: Path) -> None:
    """Raises ValueError for a run without a finished epoch, OSError where it cannot be written."""
    epochs = {_name(run): epoch_records(run) for run in runs}
    last = max(records[-1]["epoch"] + 1 for records in epochs.values())

    def curves(key: str, times: float = 1, marks: str = "line") -> list[Series]:
        return [
            Series(
                name,
                [
                    (each["epoch"] + 1, None if each.get(key) is None else times * each[key])
                    for each in records
                ],
                KINDS[number % len(KINDS)],
                marks,
            )
            for number, (name, records) in enumerate(epochs.items())
        ]

    body = [
        f"<h1>{len(runs)} runs</h1>",
        table(("run", "dense, %", "sparse, %", "difference", "sparsity, %", "FLOPs"), map(_row, runs)),
        chart("test top-1, %", curves("val_top1"), last),
        chart("test loss", curves("val_loss"), last),
        chart("sparsity, %", curves("sparsity", 100, "steps"), last),
        _differences(runs),
    ]
    write_text(path, page(", ".join(epochs), body))


def _name(run: RunDir) -> str:
    return f"{run.path.parent.name} {run.path.name}"


def _row(run: RunDir) -> tuple[str, ...]:
    result = run.read_result()
    if result is None:
        return (_name(run), *["-"] * 4, "not finished")
    dense, sparse = result.get(DENSE_TWIN), result.get(SPARSE)
    ratio = (result.get("flops") or {}).get("training_ratio")
    return (
        _name(run),
        f"{dense['top1']:.2f}" if dense else "-",
        f"{sparse['top1']:.2f}" if sparse else "-",
        f"{sparse['top1'] - dense['top1']:+.2f}" if dense and sparse else "-",
        f"{100 * sparse['sparsity']:.2f}" if sparse else "-",
        f"{ratio:.3f}" if ratio else "-",
    )


def _differences(runs: Sequence[RunDir]) -> str:
    recipes = [recipe_of(run) for run in runs]
    keys = list(dict.fromkeys(key for recipe in recipes for key in recipe))
    missing: Any = object()
    rows = [
        (key, *(str(recipe.get(key, "-")) for recipe in recipes))
        for key in keys
        if any(recipe.get(key, missing) != recipes[0].get(key, missing) for recipe in recipes)
    ]
    if not rows:
        return "<p>Their recipes are the same.</p>"
    heads = html.escape("Where their recipes differ")
    return f"<h2>{heads}</h2>{table(('', *map(_name, runs)), rows)}"
