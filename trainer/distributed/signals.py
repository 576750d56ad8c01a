"""A polite end: the first signal asks the loop to save and stop, a second Ctrl-C ends at once."""

from __future__ import annotations

import signal
import time
from types import FrameType
from typing import Any

import torch

from trainer.distributed import ranks

ASK_SECONDS = 3.0  # between ranks' questions whether one of them got a signal

# The launcher's, a Ctrl-C, a terminal that closed, and what SLURM's --signal sends before the time is over
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


class StopRequest:
    """While entered, `number` holds the signal that asked to stop, 0 before one came.

    The launcher turns a Ctrl-C into SIGINT and SIGTERM together, so only a repeated SIGINT means impatience.
    """

    def __init__(self) -> None:
        self.number = 0
        self._interrupts = 0
        self._ask_calls = self._until_asked = 1
        self._asked_at = time.monotonic()
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def came(self, or_else: bool, device: torch.device, at_once: bool = False) -> bool:
        """Whether a signal, or something else to stop for, came to any rank. Several ranks ask each other
        every few seconds, all at the same call: the launcher kills half a minute after its signal. at_once:
        ask in any case."""
        asked = self.number != 0 or or_else
        if ranks.world_size() == 1:
            return asked
        self._until_asked -= 1
        if self._until_asked > 0 and not at_once:
            return False
        now = time.monotonic()
        pace = (now - self._asked_at) / self._ask_calls
        answers = ranks.sum_over_ranks(torch.tensor([float(asked), pace], device=device)).tolist()
        calls = ASK_SECONDS * ranks.world_size() / max(answers[1], 1e-6)
        self._ask_calls = self._until_asked = max(1, int(calls))
        self._asked_at = now
        return bool(answers[0] > 0)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            raise KeyboardInterrupt
