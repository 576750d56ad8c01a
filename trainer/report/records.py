"""What pages and pictures read of a run's folder."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from trainer.checkpoints.run_dir import RunDir
from trainer.config.recipes import read_yaml


def epoch_records(run_dir: RunDir) -> list[dict[str, Any]]:
    """Raises ValueError where no epoch is finished."""
    records = [record for record in run_dir.read_metrics() if record["kind"] == "epoch"]
    if not records:
        raise ValueError(f"{run_dir.metrics} holds no finished epoch")
    return records


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
