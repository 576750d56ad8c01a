"""What pages and pictures read of a run's folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from trainer.checkpoints.run_dir import RunDir
from trainer.config.recipes import read_yaml

MOST = 400  # points of a curve over steps
Point = tuple[float, float | None]


def epoch_records(run_dir: RunDir, records: Sequence[dict[str, Any]] | None = None) -> list[dict[str, Any]]:
    """records: the run's, where they are read already. Raises ValueError where no epoch is finished."""
    records = run_dir.read_metrics() if records is None else records
    epochs = [record for record in records if record["kind"] == "epoch"]
    if not epochs:
        raise ValueError(f"{run_dir.metrics} holds no finished epoch")
    return epochs


def points(
    epochs: Sequence[dict[str, Any]], key: str, times: float = 1, phase: str | None = None
) -> list[Point]:
    """(epochs done, value), None where a record has none. phase: of those epochs alone."""
    return [
        (record["epoch"] + 1, None if record.get(key) is None else times * record[key])
        for record in epochs
        if phase in (None, record["phase"])
    ]


def rates(records: Sequence[dict[str, Any]], recipe: dict[str, Any]) -> tuple[list[Point], str]:
    """(epochs done, learning rate), and the marks of charts.Series: steps where it changes with epochs alone;
    else within epochs, too, where steps are recorded; of many, every so many."""
    ends = [record for record in records if record["kind"] == "epoch"]
    if recipe.get("lr.by") == "epoch":
        return points(ends, "lr"), "steps"
    steps = ends[-1]["step"] / (ends[-1]["epoch"] + 1) or 1
    found = sorted((min(record["step"] / steps, record["epoch"] + 1), record["lr"]) for record in records)
    return sorted({*found[:: max(1, len(found) // MOST)], found[-1]}), "line"


def recipe_of(run_dir: RunDir) -> dict[str, Any]:
    """By dotted keys; empty where it cannot be read."""
    with suppress(OSError, ValueError):
        content = read_yaml(run_dir.path / "config.yaml")
        return dict(flat(content)) if isinstance(content, dict) else {}
    return {}


def flat(content: dict[str, Any], above: str = "") -> list[tuple[str, Any]]:
    """(dotted key, value) of a nested mapping."""
    found: list[tuple[str, Any]] = []
    for key, value in content.items():
        name = f"{above}{key}"
        found += flat(value, f"{name}.") if isinstance(value, dict) else [(name, value)]
    return found


def json_of(path: Path) -> Any:
    """None where the file is missing or cannot be read."""
    with suppress(OSError, ValueError, RecursionError):
        return json.loads(path.read_text(encoding="utf-8"))
    return None
