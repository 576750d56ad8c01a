"""report.html of a run: what came out, what it cost, and how it went over the epochs."""

from __future__ import annotations

import html
import shlex
from statistics import median
from typing import Any

from data.atomic import write_text
from trainer.checkpoints.run_dir import DENSE_TWIN, FINETUNED_DENSE, SPARSE, RunDir
from trainer.report.charts import Series, chart, phases
from trainer.report.page import bars, cards, folded, page, table
from trainer.report.records import epoch_records, json_of

Record = dict[str, Any]


def write_report(run_dir: RunDir, result: Record | None = None) -> None:
    """result: as result.json will have it, where that is not there yet. Raises ValueError when the run has no
    finished epoch yet."""
    epochs = epoch_records(run_dir)
    result = result or run_dir.read_result()
    name = f"{run_dir.path.parent.name} {run_dir.path.name}"
    about = (
        f"<p class=soft>{html.escape(str(result.get('schedule', '')))}</p>"
        if result
        else "<p>not finished yet</p>"
    )
    body = [
        f"<h1>{html.escape(name)}</h1><p class=soft>{html.escape(about)}</p>",
        _headline(result) if result else "",
        *_curves(epochs, result),
        _cost(epochs, result),
        _layers(epochs),
        _kernels(json_of(run_dir.kernels)),
        *_origin(run_dir, result),
    ]
    write_text(run_dir.report, page(name, body))


def _headline(result: Record) -> str:
    figures = []
    for key, title, kind in (
        (DENSE_TWIN, "dense twin", "dense"),
        (SPARSE, "sparse model", "sparse"),
        (FINETUNED_DENSE, "dense twin, trained on", "dense"),
    ):
        if row := result.get(key):
            below = f"test top-1, epoch {row['epoch'] + 1}"
            if isinstance(images := row.get("num_images"), int):
                below = f"top-1 of {images:,} test images, epoch {row['epoch'] + 1}"
            share = f"; {100 * row['sparsity']:.2f} % of weights are 0" if key == SPARSE else ""
            figures.append((title, f"{row['top1']:.2f} %", below + share, kind))
    dense, sparse = result.get(DENSE_TWIN), result.get(SPARSE)
    if dense and sparse:
        gap = sparse["top1"] - dense["top1"]
        figures.append(("difference", f"{gap:+.2f}", "points, sparse model less dense twin", ""))
    return cards(figures)


def _curves(epochs: list[Record], result: Record | None) -> list[str]:
    """Charts by epochs done."""
    last, shaded = epochs[-1]["epoch"] + 1, phases([record["phase"] for record in epochs])
    first = epochs[0]["epoch"]
    shaded = [(begin + first, end + first) for begin, end in shaded]

    def points(key: str, times: float = 1, phase: str | None = None) -> list[tuple[float, float | None]]:
        return [
            (record["epoch"] + 1, None if record.get(key) is None else times * record[key])
            for record in epochs
            if phase in (None, record["phase"])
        ]

    pair = [
        Series(title, [(row["epoch"] + 1, row["top1"])], kind, "star")
        for key, title, kind in ((DENSE_TWIN, "dense twin", "dense"), (SPARSE, "sparse model", "kept"))
        if (row := (result or {}).get(key))
    ]
    accuracy = [
        Series("test top-1", points("val_top1"), "plain"),
        Series("evaluated dense", points("val_top1", phase="dense"), "dense", "dots"),
        Series("evaluated sparse", points("val_top1", phase="sparse"), "kept", "dots"),
        Series("averaged weights", points("ema_top1"), "third"),
        Series("random labels", points("memorised_top1"), "fourth"),
        Series("their true labels", points("memorised_true_top1"), "fifth"),
        *pair,
    ]
    loss = [
        Series("training", points("train_loss"), "plain"),
        Series("test", points("val_loss"), "dense"),
    ]
    change = Series("weights that changed", _held(points("mask_difference", 100)), "kept", "steps")
    speed = [
        Series("dense phases", points("images_per_second", phase="dense"), "dense", "dots"),
        Series("sparse phases", points("images_per_second", phase="sparse"), "kept", "dots"),
    ]
    drawn = (
        ("accuracy, %", accuracy),
        ("loss", loss),
        ("sparsity, %", [Series("weights that are 0", points("sparsity", 100), "kept", "steps")]),
        ("mask change from one compression to the next, % of weights", [change]),
        ("learning rate", [Series("learning rate", points("lr"), "dense")]),
        ("training speed, images/s", speed),
        ("waiting for data, % of the time", [Series("data wait", points("data_wait", 100), "plain")]),
    )
    return [chart(title, series, last, shaded) for title, series in drawn]


def _held(points: list[tuple[float, float | None]]) -> list[tuple[float, float | None]]:
    """Each value until the next one."""
    held: list[tuple[float, float | None]] = []
    for x, y in points:
        held.append((x, held[-1][1] if y is None and held else y))
    return held


def _cost(epochs: list[Record], result: Record | None) -> str:
    rows: list[tuple[str, str]] = []
    flops = (result or {}).get("flops") or {}
    if flops.get("training_ratio"):
        rows.append(("counted FLOPs of training", f"{flops['training_ratio']:.3f} of dense training"))
    if flops.get("inference_ratio"):
        rows.append(("counted FLOPs of the sparse model", f"{flops['inference_ratio']:.3f} of dense"))
    seconds, before = {"dense": 0.0, "sparse": 0.0}, 0.0
    for record in epochs:
        seconds[record["phase"]] += max(record.get("seconds", before) - before, 0)
        before = record.get("seconds", before)
    measured = (result or {}).get("speed") or {}  # without the epochs that compile
    for phase, key in (("dense", "dense_images_per_second"), ("sparse", "compressed_images_per_second")):
        those = [record for record in epochs if record["phase"] == phase]
        if those:
            speed = measured.get(key) or median(record.get("images_per_second", 0) for record in those)
            spent = _duration(seconds[phase])
            rows.append((f"{phase} phases", f"{len(those)} epochs, {spent}, {speed:,.0f} images/s"))
    if share := measured.get("time_of_dense"):
        rows.append(("time of training", f"{share:.2f} of as many dense epochs"))
    return "<h2>What it cost</h2>" + table(("", ""), rows) if rows else ""


def _layers(epochs: list[Record]) -> str:
    sparse = [record for record in epochs if record["phase"] == "sparse" and record.get("layer_sparsity")]
    if not sparse:
        return ""
    rows = (
        (name, 1 - share, f"{100 * (1 - share):.2f} %")
        for name, share in sparse[-1]["layer_sparsity"].items()
    )
    title = f"<h2>Weights kept, by layer, after {sparse[-1]['epoch'] + 1} epochs</h2>"
    return title + bars(("layer", "kept"), rows)


def _kernels(chosen: Any) -> str:
    """chosen: content of kernels.json."""
    if not isinstance(chosen, list):
        return ""
    rows = []
    for layer in chosen:
        times = layer.get("microseconds") or {}
        found = [times.get(product) or {} for product in ("forward", "gradient", "weight_gradient")]
        told = [
            " + ".join(f"{each[kind]:,.0f}" if each.get(kind) else "-" for each in found) if times else "-"
            for kind in ("dense", "sparse")
        ]
        rows.append(
            (
                layer.get("layer", ""),
                *told,
                (layer.get("choice") or "").split(" ")[0],
                layer.get("reason") or "",
            )
        )
    columns = ("layer", "dense, µs", "sparse, µs", "runs", "")
    return f"<details><summary>Kernels of sparse phases, by layer</summary>{table(columns, rows)}</details>"


def _origin(run_dir: RunDir, result: Record | None) -> list[str]:
    """Where it comes from, and how to do it again."""
    environment = json_of(run_dir.path / "env.json") or {}
    command = environment.get("command") or []
    words = [word for word in map(str, command[1:]) if not word.startswith("--local_rank")]
    parts = []
    if words:
        parts.append("<h2>To repeat it</h2><pre>" + html.escape(f"acdc train {shlex.join(words)}") + "</pre>")
    for title, name in (
        ("Configuration", "config.yaml"),
        ("Environment", "env.json"),
        ("DeepSpeed", "deepspeed.json"),
        ("Figures", "result.json"),
    ):
        path = run_dir.path / name
        if path.exists():
            parts.append(folded(title, path.read_text(encoding="utf-8", errors="replace")))
    return parts


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02} h" if hours else f"{minutes}:{rest:02} min"
