"""Contenders that take turns in one process, so that whatever else the machine does meets all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks.record import spread


def take_turns(
    contenders: Mapping[str, Callable[[], Any]],
    turns: int,
    steps: int,
    device: torch.device,
    on_turn: Callable[[int], None] = lambda turn: None,
) -> dict[str, list[float]]:
    """Seconds of a step of each contender, one figure a turn of `steps` steps. Every contender first warms up
    with a turn that does not count, and compiles there. on_turn: told how many are over."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(turns + 1):
        # the order alternates, so that none always follows the same other
        for name in sorted(contenders, reverse=turn % 2 == 0):
            _wait_for(device)
            begin = time.perf_counter()
            for _ in range(steps):
                contenders[name]()
            _wait_for(device)
            if turn:
                seconds[name].append((time.perf_counter() - begin) / steps)
        on_turn(turn)
    return seconds


def ratios(over: list[float], under: list[float]) -> dict[str, float]:
    """Spread of the quotients, turn by turn."""
    return spread([a / b for a, b in zip(over, under, strict=True)])


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
