"""Durations as recipes write them: a number of epochs or of optimizer steps."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator

_DURATION = re.compile(r"([1-9]\d*)(ep|st)")


def _check_duration(value: Any) -> Any:
    if not isinstance(value, str) or _DURATION.fullmatch(value) is None:
        raise ValueError(f"{value!r} is not a duration; write a number of epochs or steps: 1ep, 500st")
    return value


Duration = Annotated[str, BeforeValidator(_check_duration)]


def duration_steps(duration: str, steps_per_epoch: int) -> int:
    """Optimizer steps of "1ep" or "500st"."""
    match = _DURATION.fullmatch(duration)
    assert match is not None, duration
    return int(match[1]) * (steps_per_epoch if match[2] == "ep" else 1)
