"""What a run cost, in FLOPs and in time, phase by phase and against dense training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from statistics import median
from typing import Any

from trainer.report.page import bars, folded, note, table

Record = dict[str, Any]
MANY = 12  # phases that are listed without being asked for
SPEEDS = {"dense": "dense_images_per_second", "sparse": "compressed_images_per_second"}  # in result.json
COLUMNS = ("FLOPs, \u00d7\u00a0dense", "time", "time, \u00d7\u00a0dense", "images/s")


@dataclass(frozen=True)
class Spent:
    """In some epochs; None where the records do not say. dense_...: of as many dense epochs."""

    title: str
    kind: str
    flops: float | None
    dense_flops: float | None
    seconds: float | None
    dense_seconds: float | None
    speed: float | None
    top1: float

    def row(self) -> tuple[str, ...]:
        return (
            self.title,
            ratio(self.flops, self.dense_flops),
            "-" if self.seconds is None else duration(self.seconds),
            ratio(self.seconds, self.dense_seconds),
            "-" if self.speed is None else f"{self.speed:,.0f}",
        )


def cost_of(epochs: Sequence[Record], result: Record | None) -> list[str]:
    """Parts of a section, in HTML. epochs: of one run."""
    costs = _costs(epochs)
    by_kind = {kind: [each for each in costs if each.kind == kind] for kind in ("dense", "sparse")}
    kinds = [_sum(f"{len(those)}\u00a0{kind}", kind, those) for kind, those in by_kind.items() if those]
    measured = (result or {}).get("speed") or {}  # without the epochs that compile
    kinds = [replace(each, speed=measured.get(SPEEDS[each.kind]) or each.speed) for each in kinds]
    whole = _sum(f"all\u00a0{len(costs)}", "", costs)
    facts, flops = [], (result or {}).get("flops") or {}
    told = flops.get("training_ratio") or (whole.flops or 0) / (whole.dense_flops or 1)
    if told:
        facts.append(f"Training took {told:.3f} of dense training's FLOPs")
    if flops.get("inference_ratio"):
        facts.append(f"an image through the sparse model {flops['inference_ratio']:.3f} of dense")
    if share := measured.get("time_of_dense"):
        facts.append(f"its steps took {share:.2f} of as many dense epochs' time")
    spans = [(kind, list(those)) for kind, those in groupby(costs, lambda each: each.kind)]
    single = [_sum(f"{kind}\u00a0{_numbers(those)}", kind, those) for kind, those in spans]
    listed = table(
        ("epochs", *COLUMNS, "top-1, %"),
        [(*each.row(), f"{each.top1:.2f}") for each in single],
        kinds=[each.kind for each in single],
    )
    summed = [*kinds, whole]
    return [
        note("; ".join(facts) + ".") if facts else "",
        _drawn(kinds, whole),
        table(("epochs", *COLUMNS), map(Spent.row, summed), kinds=[each.kind or "sum" for each in summed]),
        folded("Phase by phase", listed, is_open=len(single) <= MANY),
        note(
            "FLOPs are counted, as in the paper. Time is by the clock, with evaluation and compilation; a "
            "dense epoch's is the median of the dense phases, without the first epoch, which compiles."
        ),
    ]


def _numbers(those: Sequence[Spent]) -> str:
    """Of epochs."""
    first, last = those[0].title, those[-1].title
    return first if first == last else f"{first}\u2013{last}"


def _drawn(kinds: Sequence[Spent], whole: Spent) -> str:
    """Two bars, FLOPs and time, that a dense training would fill."""
    rows = []
    for title, key, unit in (("FLOPs", "flops", "dense_flops"), ("time", "seconds", "dense_seconds")):
        dense, spent = getattr(whole, unit), getattr(whole, key)
        if dense and spent is not None:
            scale = max(dense, spent)
            parts = [(each.kind, (getattr(each, key) or 0.0) / scale) for each in kinds]
            rows.append((title, parts, f"{ratio(spent, dense)} of dense"))
    return bars(rows) if rows else ""


def _costs(epochs: Sequence[Record]) -> list[Spent]:
    """Of each epoch; its title is its number."""
    seconds, flops = _each(epochs, "seconds"), _each(epochs, "training_flops")
    full = _each(epochs, "dense_training_flops")
    dense = [place for place, record in enumerate(epochs) if record["phase"] == "dense"]
    if known := [each for place in dense if (each := flops[place])]:
        full = [median(known) if each is None else each for each in full]  # older records do not say
    times = [each for place in dense[1:] or dense if (each := seconds[place])]
    dense_seconds = median(times) if times else None
    return [
        Spent(
            title=f"{record['epoch'] + 1}",
            kind=record["phase"],
            flops=flops[place],
            dense_flops=None if flops[place] is None else full[place],
            seconds=seconds[place],
            dense_seconds=None if seconds[place] is None else dense_seconds,
            speed=record.get("images_per_second") or None,
            top1=record["val_top1"],
        )
        for place, record in enumerate(epochs)
    ]


def _each(epochs: Sequence[Record], key: str) -> list[float | None]:
    """What each epoch adds to a sum that the records keep. A branch took its FLOPs over from another run."""
    begins_here = epochs[0]["epoch"] == 0 or key == "seconds"
    values = [record.get(key) for record in epochs]
    before = [0.0 if begins_here else None, *values]
    return [
        None if old is None or new is None else max(new - old, 0.0)
        for old, new in zip(before, values, strict=False)
    ]


def _sum(title: str, kind: str, those: Sequence[Spent]) -> Spent:
    def total(key: str) -> float | None:
        known = [value for each in those if (value := getattr(each, key)) is not None]
        return sum(known) if known else None

    speeds = [each.speed for each in those if each.speed]
    return Spent(
        title=title,
        kind=kind,
        flops=total("flops"),
        dense_flops=total("dense_flops"),
        seconds=total("seconds"),
        dense_seconds=total("dense_seconds"),
        speed=median(speeds) if speeds else None,
        top1=those[-1].top1,
    )


def ratio(part: float | None, whole: float | None) -> str:
    return "-" if part is None or not whole else f"{part / whole:.3f}"


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}\u00a0h" if hours else f"{minutes}:{rest:02}\u00a0min"
