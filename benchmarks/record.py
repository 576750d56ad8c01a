"""What all benchmarks share: spread of measurements, and records with provenance."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from trainer.environment import environment

RESULTS = Path(__file__).parent / "results"


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def show_spread(values: dict[str, float], digits: int = 1) -> str:
    """ "12.3 (11.9 to 12.8)" """
    median, low, high = (f"{values[key]:,.{digits}f}" for key in ("median", "min", "max"))
    return f"{median} ({low} to {high})"


def console() -> Console:
    """As wide as the terminal, and wide enough for tables elsewhere."""
    screen = Console(highlight=False)
    return screen if screen.is_terminal else Console(highlight=False, width=140)


def write_record(path: Path, content: dict[str, Any]) -> None:
    """A JSON record, with what machine, versions, revision and command it comes from."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": environment(), **content}, indent=1) + "\n", encoding="utf-8")
    print(f"record: {path}")
