"""One function over many items in several processes, which may die of an item.

Processes get batches. Where one dies, the items of its batch are handed out one by one; an item that two
processes have died of by itself is given up. All other items get their result.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from math import ceil
from typing import TypeVar

from pebble import ProcessExpired, ProcessFuture, ProcessPool

_NUM_GIVEN = 32  # items in a batch: handing over one takes about as long as decoding an image
_NUM_AHEAD = 4  # batches a process that are handed over before they are needed

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Died:
    """In place of a result: two processes ended while they had this item alone. how: exit status in words."""

    how: str


def apply(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    workers: int,
    on_progress: Callable[[int, int], None],
) -> list[tuple[Item, Result | Died]]:
    """function(item) of all items, from `workers` processes, in the order in which they became known.

    function and items have to be picklable. on_progress: called with the items done and the items in all, at
    the start and after each. Raises ValueError for less than one worker, RuntimeError where a process ends
    before it has begun, and what function raises."""
    if workers < 1:
        raise ValueError(f"workers is {workers}, must be at least 1")
    # a fork of this process could inherit a held lock
    pool = ProcessPool(workers, context=multiprocessing.get_context("forkserver"))
    size = max(1, min(_NUM_GIVEN, ceil(len(items) / workers)))
    batches = (items[begin : begin + size] for begin in range(0, len(items), size))
    running: deque[tuple[Sequence[Item], bool, ProcessFuture[list[Result]]]] = deque()  # bool: a second try
    results: list[tuple[Item, Result | Died]] = []

    def start(batch: Sequence[Item], again: bool) -> None:
        running.append((batch, again, pool.schedule(_each, (function, batch))))

    try:
        on_progress(0, len(items))
        while True:
            for batch in islice(batches, max(0, _NUM_AHEAD * workers - len(running))):
                start(batch, again=False)
            if not running:
                return results
            batch, again, future = running.popleft()
            try:
                done: Sequence[Result | Died] = future.result()
            except ProcessExpired as error:
                if len(batch) > 1 or not again:
                    for item in batch:
                        start([item], again=len(batch) == 1)
                    continue
                code = error.exitcode
                done = [Died(signal.Signals(-code).name if code < 0 else f"exit status {code}")]
            for item, result in zip(batch, done, strict=True):
                results.append((item, result))
                on_progress(len(results), len(items))
    except RuntimeError as error:
        raise error if pool.active else RuntimeError("a worker process ended before its first item") from None
    finally:
        pool.stop()  # type: ignore[no-untyped-call]
        pool.join()


def _each(function: Callable[[Item], Result], batch: Sequence[Item]) -> list[Result]:
    return [function(item) for item in batch]
