"""Throughput and the share of time spent waiting for data."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TypeVar

T = TypeVar("T")


class Clock:
    """Counts from the end of a process's first step, which compiles, or from restart() on."""

    def __init__(self) -> None:
        self._begun = False
        self.restart()

    def restart(self) -> None:
        self._start = time.perf_counter()
        self._waited = 0.0
        self._images = 0

    def next_of(self, batches: Iterator[T]) -> T:
        """next(batches), its time counted as waiting for data."""
        before = time.perf_counter()
        batch = next(batches)
        self._waited += time.perf_counter() - before
        return batch

    def step(self, num_images: int) -> None:
        if self._begun:
            self._images += num_images
        else:
            self._begun = True
            self.restart()

    @property
    def rates(self) -> dict[str, float]:
        """By the names of their records."""
        seconds = max(time.perf_counter() - self._start, 1e-9)
        return {"images_per_second": self._images / seconds, "data_wait": self._waited / seconds}
