"""report.html of a run: accuracy, loss, learning rate and sparsity over the epochs, sparse phases shaded."""

from __future__ import annotations

import html
import io
import json
import math
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from data.atomic import write_text
from trainer.checkpoints.run_dir import DENSE_TWIN, SPARSE, RunDir

BLUE, ORANGE, GREY, SHADE = "#1f5f99", "#c8590a", "#666666", "#f3e3c8"


def write_report(run_dir: RunDir, result: dict[str, Any] | None = None) -> None:
    """result: as result.json will have it, where that is not there yet. Raises ValueError when the run has no
    finished epoch yet."""
    epochs = epoch_records(run_dir)
    result = result or run_dir.read_result()
    title = html.escape(f"{run_dir.path.parent.name} {run_dir.path.name}")
    figures = "\n".join(_svg(figure) for figure in (accuracy_figure(epochs, result), detail_figure(epochs)))
    figures_json = html.escape(json.dumps(result, indent=1)) if result else "the run is not finished"
    write_text(
        run_dir.report,
        f'<!doctype html><meta charset="utf-8"><title>{title}</title>\n'
        "<style>body{font:15px sans-serif;max-width:60em;margin:2em auto}"
        "svg{max-width:100%;height:auto}</style>\n"
        f"<h1>{title}</h1>\n{figures}\n<pre>{figures_json}</pre>\n",
    )


def write_picture(run_dir: RunDir, path: Path) -> None:
    """The accuracy over the phases as a picture; the format is the suffix's (svg, png). Raises ValueError."""
    figure = accuracy_figure(epoch_records(run_dir), run_dir.read_result())
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})


def epoch_records(run_dir: RunDir) -> list[dict[str, Any]]:
    records = [record for record in run_dir.read_metrics() if record["kind"] == "epoch"]
    if not records:
        raise ValueError(f"{run_dir.metrics} holds no finished epoch")
    return records


def accuracy_figure(epochs: list[dict[str, Any]], result: dict[str, Any] | None) -> Figure:
    figure = Figure(figsize=(8, 3.6))
    axes = figure.subplots()
    done = [record["epoch"] + 1 for record in epochs]
    for key, label, color, marker in (
        ("val_top1", "test top-1", BLUE, "o"),
        ("memorised_top1", "top-1 on random labels", ORANGE, ""),
        ("memorised_true_top1", "top-1 on their true labels", GREY, ""),
    ):
        if key in epochs[0]:
            values = [record.get(key, math.nan) for record in epochs]
            axes.plot(done, values, color=color, marker=marker, markersize=4, label=label)
    for key, name, color in ((DENSE_TWIN, "dense twin", GREY), (SPARSE, "sparse model", ORANGE)):
        if row := (result or {}).get(key):
            label = f"{name}: {row['top1']:.2f} % at {100 * row['sparsity']:.1f} % sparsity"
            axes.plot(row["epoch"] + 1, row["top1"], "*", color=color, markersize=14, label=label, zorder=3)
    axes.set_ylabel("test top-1, %")
    _shade(axes, epochs)
    axes.legend(loc="lower right")
    return figure


def detail_figure(epochs: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(8, 7))
    loss, lr, sparsity = figure.subplots(3, sharex=True)
    done = [record["epoch"] + 1 for record in epochs]
    loss.plot(done, [record["train_loss"] for record in epochs], color=GREY, label="training")
    loss.plot(done, [record["val_loss"] for record in epochs], color=BLUE, label="test")
    loss.set_ylabel("loss")
    loss.legend(loc="upper right")
    lr.plot(done, [record["lr"] for record in epochs], color=BLUE)
    lr.set_ylabel("learning rate")
    sparsity.plot(done, [100 * record["sparsity"] for record in epochs], color=BLUE, label="sparsity")
    changes = [
        (r["epoch"] + 1, 100 * r["mask_difference"]) for r in epochs if r.get("mask_difference") is not None
    ]
    sparsity.plot(*zip(*changes, strict=True), "*", color=ORANGE, label="mask change") if changes else None
    sparsity.set_ylabel("% of weights")
    sparsity.legend(loc="upper left")
    for axes in (loss, lr, sparsity):
        _shade(axes, epochs)
    return figure


def _shade(axes: Axes, epochs: list[dict[str, Any]]) -> None:
    label: str | None = "sparse phase"
    for record in epochs:
        if record["phase"] == "sparse":
            axes.axvspan(
                record["epoch"], record["epoch"] + 1, color=SHADE, zorder=0, label=label, linewidth=0
            )
            label = None
    axes.set_xlabel("epochs done")
    axes.set_xlim(0, epochs[-1]["epoch"] + 1.2)
    axes.grid(alpha=0.3)


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]
