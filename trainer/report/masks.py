"""The sparse side of a run: how many weights are 0, which ones from compression to compression, where, and by
which kernels their layers compute."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from trainer.report.charts import Series, chart
from trainer.report.page import bars, folded, grid, note, table
from trainer.report.records import points

Record = dict[str, Any]
PRODUCTS = ("forward", "gradient", "weight_gradient")


def sparsity_chart(epochs: Sequence[Record], last: float, shaded: Sequence[tuple[float, float]]) -> str:
    zeros = [Series("weights that are 0", points(epochs, "sparsity", 100), "kept", "steps")]
    title = "sparsity, % of the prunable weights"
    return chart(title, zeros, last, shaded, wide=170, from_zero=True, legend=False)


def change_charts(epochs: Sequence[Record], last: float, shaded: Sequence[tuple[float, float]]) -> str:
    """What each compression changed against the one before, as steps that hold until the next. Records from
    before kept, dropped and regrown weights were counted have one share for all."""
    kept, dropped, regrown = (
        _held([(record["epoch"] + 1, _share(record, f"mask_{key}")) for record in epochs])
        for key in ("kept", "dropped", "regrown")
    )
    changed = [
        Series("regrown", regrown, "fourth", "steps"),
        Series("dropped", dropped, "fifth", "steps", down=True),
    ]
    if not any(each.drawn for each in changed):
        change = Series("changed sides", _held(points(epochs, "mask_difference", 100)), "kept", "steps")
        title = "mask change from compression to compression, % of the prunable weights"
        return grid(chart(title, [change], last, shaded, from_zero=True))
    again = [Series("kept", kept, "kept", "steps")]
    charts = (
        chart("regrown and dropped weights, %", changed, last, shaded),
        chart("weights kept again, %", again, last, shaded),
    )
    about = "Mask change: each compression against the one before, in percent of the weights that one kept."
    return note(about) + grid(*charts)


def _share(record: Record, key: str) -> float | None:
    """Percent of the weights that the compression before had kept."""
    counts = [record.get(name) for name in ("mask_kept", "mask_dropped", key)]
    kept, dropped, asked = (None if each is None else float(each) for each in counts)
    if kept is None or dropped is None or asked is None or kept + dropped == 0:
        return None
    return 100 * asked / (kept + dropped)


def _held(given: list[tuple[float, float | None]]) -> list[tuple[float, float | None]]:
    """Each value until the next one."""
    held: list[tuple[float, float | None]] = []
    for x, y in given:
        held.append((x, held[-1][1] if y is None and held else y))
    return held


def layers(epochs: Sequence[Record]) -> tuple[str, str]:
    """Title and content of a section: what each layer keeps in the newest sparse epoch."""
    sparse = [record for record in epochs if record["phase"] == "sparse" and record.get("layer_sparsity")]
    if not sparse:
        return "", ""
    newest = sparse[-1]
    rows = [
        (name, [("kept", 1 - share)], f"{100 * (1 - share):.2f} %")
        for name, share in newest["layer_sparsity"].items()
    ]
    all_together = f"{100 * (1 - newest['sparsity']):.2f} % in all {len(rows)} layers together"
    return (
        f"Weights kept, by layer, after {newest['epoch'] + 1} epochs",
        note(f"{all_together}; in the network's order.") + f"<div class=layers>{bars(rows)}</div>",
    )


def kernels(chosen: Any) -> str:
    """chosen: content of kernels.json. Empty where it is none."""
    if not isinstance(chosen, list):
        return ""
    rows, kinds = [], []
    for layer in chosen:
        times = layer.get("microseconds") or {}
        found = [times.get(product) or {} for product in PRODUCTS]
        told = [
            " + ".join(f"{each[kind]:,.0f}" if each.get(kind) else "-" for each in found) if times else "-"
            for kind in ("dense", "sparse")
        ]
        kinds.append((layer.get("choice") or "").split(" ")[0])
        rows.append((layer.get("layer", ""), *told, kinds[-1], layer.get("reason") or ""))
    counts = ", ".join(f"{count} {kind}" for kind, count in Counter(kinds).most_common() if kind)
    columns = ("layer", "dense, µs", "sparse, µs", "runs", "")
    about = note(
        "Measured as the first sparse phase began: forward + gradient of the input + gradient of the weights."
    )
    listed = table(columns, rows, texts=(0, 3, 4), kinds=kinds)
    return about + folded(f"By layer: {counts}", listed, is_open=len(rows) <= 12)
