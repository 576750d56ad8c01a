"""A polite end: the first signal asks the loop to save and stop, a second Ctrl-C ends at once."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

# The launcher's, a Ctrl-C, a terminal that closed, and what SLURM's --signal sends before the time is over
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


class StopRequest:
    """While entered, `number` holds the signal that asked to stop, 0 before one came.

    The launcher turns a Ctrl-C into SIGINT and SIGTERM together, so only a repeated SIGINT means impatience.
    """

    def __init__(self) -> None:
        self.number = 0
        self._interrupts = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.number = self.number or number
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            raise KeyboardInterrupt
