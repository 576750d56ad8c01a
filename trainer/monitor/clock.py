"""Throughput and the share of time spent waiting for data.

On a GPU the host runs ahead: the loader gives a batch at once, and the stream waits for it. So times are
points on the stream, CUDA events, and what is measured is how long the device stands still.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class Clock:
    """Counts from the end of a process's first step, which compiles, or from restart() on."""

    def __init__(self, device: torch.device) -> None:
        self._now = _on_the_stream if device.type == "cuda" else time.perf_counter
        self._begun = False
        self.restart()

    def restart(self) -> None:
        self._start: Any = self._now()
        self._waits: list[tuple[Any, Any]] = []  # since the rates were read last: from, to
        self._waited = 0.0
        self._images = 0

    def next_of(self, batches: Iterator[T]) -> T:
        """next(batches), its time counted as waiting for data. On a GPU that is from the end of the work
        enqueued before to the batch's arrival, so it is 0 where the batch is there already."""
        before = self._now()
        batch = next(batches)
        self._waits.append((before, self._now()))
        return batch

    def step(self, num_images: int) -> None:
        if self._begun:
            self._images += num_images
        else:
            self._begun = True
            self.restart()

    @property
    def rates(self) -> dict[str, float]:
        """By the names of their records. Waits for the device: read them where the loss was read."""
        now = self._now()
        if not isinstance(now, float):
            now.synchronize()
        seconds = max(_seconds(self._start, now), 1e-9)
        self._waited += sum(_seconds(*wait) for wait in self._waits)
        self._waits = []
        return {"images_per_second": self._images / seconds, "data_wait": self._waited / seconds}


def _on_the_stream() -> torch.cuda.Event:
    """The point that the current stream reaches once it has done what is enqueued so far."""
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def _seconds(begin: Any, end: Any) -> float:
    seconds: float = end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1000
    return seconds
