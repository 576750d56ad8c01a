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
    def images_per_second(self) -> float:
        return self._images / max(time.perf_counter() - self._start, 1e-9)

    @property
    def data_wait(self) -> float:
        return self._waited / max(time.perf_counter() - self._start, 1e-9)

    @property
    def rates(self) -> dict[str, float]:
        """Both, by the names of their records."""
        return {"images_per_second": self.images_per_second, "data_wait": self.data_wait}
