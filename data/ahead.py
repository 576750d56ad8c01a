"""Batches prepared ahead of the training step, from any position on: what all backends share.

A backend reads draws (see data.stream) endlessly from one position on and makes batches of them, in threads
or processes of its own, over the end of an epoch too. Only where the training loop asks for another position
than the next is it started anew.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from data.loader import Batch
from data.stream import Stream


class AheadLoader(ABC):
    """See data.loader.Loader. A backend defines _start, _next and fingerprint.

    in_thread: prepare the next batch in a thread, for backends whose _next computes: what it computes would
    have to wait, in the training step's own thread, for cores that the step's threads have just left busy.
    """

    def __init__(self, stream: Stream, in_thread: bool = False) -> None:
        self.stream = stream
        self.position = (-1, -1)  # (epoch, batch) that comes next
        self._pool = ThreadPoolExecutor(1) if in_thread else None
        self._pending: Future[Batch] | None = None  # the batch at self.position

    @property
    def num_images(self) -> int:
        return self.stream.num_images

    @property
    def batches_per_epoch(self) -> int:
        return self.stream.batches_per_epoch

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        if self.position != (epoch, start):  # else these batches are under way already
            self.settle()
            self._pending = None
            self.position = (epoch, start)
            self._start(epoch, start)
        while self.position[0] == epoch:
            batch = self._next() if self._pending is None else self._pending.result()
            self.position = self.after(self.position)
            self._pending = None if self._pool is None else self._pool.submit(self._next)
            yield batch

    def settle(self) -> None:
        """Wait until the batch under way in the thread is ready, or has failed."""
        if self._pending is not None:
            self._pending.exception()

    def after(self, position: tuple[int, int]) -> tuple[int, int]:
        epoch, index = position
        return (epoch, index + 1) if index + 1 < self.batches_per_epoch else (epoch + 1, 0)

    def draws(self, epoch: int, start: int) -> Iterator[tuple[tuple[int, int], Any]]:
        """Every position and its draw from (epoch, start) on, without end."""
        position = (epoch, start)
        while True:
            yield position, self.stream.draw(*position)
            position = self.after(position)

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]: ...

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        del state  # (epoch, start) say it all

    @abstractmethod
    def _start(self, epoch: int, start: int) -> None:
        """Begin to prepare the batches from (epoch, start) on."""

    @abstractmethod
    def _next(self) -> Batch:
        """The batch at self.position."""
