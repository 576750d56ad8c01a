"""The accuracy over the phases of a run as a picture in a file: for a README, a paper, slides."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from trainer.checkpoints.run_dir import DENSE_TWIN, SPARSE, RunDir
from trainer.report.records import epoch_records

BLUE, ORANGE, GREY, SHADE = "#1f5f99", "#c8590a", "#666666", "#f3e3c8"


def write_picture(run_dir: RunDir, path: Path) -> None:
    """The format is the suffix's (svg, png). Raises ValueError."""
    figure = accuracy_figure(epoch_records(run_dir), run_dir.read_result())
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})


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
