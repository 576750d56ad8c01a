"""report.html of a run: what came out, what it cost, and how it went over the epochs."""

from __future__ import annotations

import html
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from data.atomic import write_text
from trainer.checkpoints.run_dir import DENSE_TWIN, FINETUNED_DENSE, SPARSE, RunDir
from trainer.report.charts import Series, chart, phases
from trainer.report.cost import cost_of, duration
from trainer.report.masks import change_charts, kernels, layers, sparsity_chart
from trainer.report.origin import hardware_of, origin
from trainer.report.page import cards, grid, note, page, section
from trainer.report.records import Point, epoch_records, json_of, points, rates, recipe_of

Record = dict[str, Any]


def write_report(run_dir: RunDir, result: Record | None = None) -> None:
    """result: as result.json will have it, where that is not there yet. Raises ValueError when the run has no
    finished epoch yet."""
    records = run_dir.read_metrics()
    epochs = epoch_records(run_dir, records)
    result = result or run_dir.read_result()
    last, first = epochs[-1]["epoch"] + 1, epochs[0]["epoch"]
    shaded = [(begin + first, end + first) for begin, end in phases([each["phase"] for each in epochs])]
    name, stamp = run_dir.path.parent.name, run_dir.path.name
    body = [
        f"<header><h1>{html.escape(name)} <small>{html.escape(stamp)}</small></h1>",
        _about(run_dir, epochs, result),
        "</header>",
        _headline(result) if result else "",
        section("Accuracy", _accuracy(epochs, result, last, shaded)),
        section("What it cost", *cost_of(epochs, result)),
        section("Masks", sparsity_chart(epochs, last, shaded), change_charts(epochs, last, shaded)),
        section(*layers(epochs)),
        section("Training", grid(*_training(epochs, rates(records, recipe_of(run_dir)), last, shaded))),
        section("Speed", grid(*_speed(epochs, last, shaded))),
        section("Kernels of sparse phases", kernels(json_of(run_dir.kernels))),
        *origin(run_dir),
    ]
    write_text(run_dir.report, page(f"{name} {stamp}", body))


def _about(run_dir: RunDir, epochs: Sequence[Record], result: Record | None) -> str:
    """A line of facts, and the phases as a strip."""
    recipe = recipe_of(run_dir)
    asked = recipe.get("epochs")
    total = max(epochs[-1]["epoch"] + 1, asked if isinstance(asked, int) else 0)
    model, data = recipe.get("model.name"), recipe.get("data.name")
    facts = [f"{model} on {data}"] if model and data else []
    done = epochs[-1]["epoch"] + 1
    facts.append(f"{total} epochs" if result else f"not finished yet: {done} of {total} epochs")
    if seconds := epochs[-1].get("seconds"):
        facts.append(duration(seconds))
    if hardware := hardware_of(json_of(run_dir.path / "env.json")):
        facts.append(hardware)
    begun, left = ("", epochs[0]["epoch"]), ("", total - done)  # a branch begins later
    spans = [(kind, len(list(those))) for kind, those in groupby(each["phase"] for each in epochs)]
    strip = "".join(
        f'<i class="{kind}" style="flex-grow:{count}"></i>' for kind, count in (begun, *spans, left) if count
    )
    schedule = (result or {}).get("schedule") or recipe.get("sparsity.schedule") or ""
    return f"{note(' · '.join(facts))}<div class=strip aria-hidden=true>{strip}</div>{note(str(schedule))}"


def _headline(result: Record) -> str:
    figures = []
    for key, title, kind in (
        (DENSE_TWIN, "dense twin", "dense"),
        (SPARSE, "sparse model", "kept"),
        (FINETUNED_DENSE, "dense twin, trained on", "dense"),
    ):
        if row := result.get(key):
            images = row.get("num_images")
            told = [f"top-1 of {images:,} test images" if isinstance(images, int) else "test top-1"]
            told.append(f"epoch {row['epoch'] + 1}")
            told += [f"{100 * row['sparsity']:.2f}\u00a0% of weights are\u00a00"] if key == SPARSE else []
            figures.append((title, f"{row['top1']:.2f} %", ", ".join(told), kind))
    dense, sparse = result.get(DENSE_TWIN), result.get(SPARSE)
    if dense and sparse:
        gap = f"{sparse['top1'] - dense['top1']:+.2f}".replace("-", "\u2212")
        figures.insert(2, ("difference", gap, "points, sparse model less dense twin", ""))
    return cards(figures)


def _accuracy(
    epochs: Sequence[Record], result: Record | None, last: float, shaded: Sequence[tuple[float, float]]
) -> str:
    pair = [
        Series(title, [(row["epoch"] + 1, row["top1"])], kind, "star")
        for key, title, kind in ((DENSE_TWIN, "dense twin", "dense"), (SPARSE, "sparse model", "kept"))
        if (row := (result or {}).get(key))
    ]
    series = [
        Series("test top-1", points(epochs, "val_top1"), "plain"),
        Series("evaluated dense", points(epochs, "val_top1", phase="dense"), "dense", "dots"),
        Series("evaluated sparse", points(epochs, "val_top1", phase="sparse"), "kept", "dots"),
        Series("averaged weights", points(epochs, "ema_top1"), "third"),
        Series("random labels", points(epochs, "memorised_top1"), "fourth"),
        Series("their true labels", points(epochs, "memorised_true_top1"), "fifth"),
        *pair,
    ]
    return chart("accuracy by epoch, %", series, last, shaded, wide=320)


def _training(
    epochs: Sequence[Record],
    learning: tuple[list[Point], str],
    last: float,
    shaded: Sequence[tuple[float, float]],
) -> list[str]:
    """learning: rates and how to draw them."""
    loss = [
        Series("training", points(epochs, "train_loss"), "plain"),
        Series("test", points(epochs, "val_loss"), "dense"),
    ]
    rate = [Series("learning rate", learning[0], "third", learning[1])]
    return [chart("loss", loss, last, shaded), chart("learning rate", rate, last, shaded)]


def _speed(epochs: Sequence[Record], last: float, shaded: Sequence[tuple[float, float]]) -> list[str]:
    speed = [
        Series(f"{phase} phases", points(epochs, "images_per_second", phase=phase), kind, "dots")
        for phase, kind in (("dense", "dense"), ("sparse", "kept"))
    ]
    wait = [Series("data wait", points(epochs, "data_wait", 100), "third")]
    return [
        chart("throughput, images/s", speed, last, shaded, from_zero=True),
        chart("waiting for data, % of the time", wait, last, shaded, from_zero=True),
    ]
