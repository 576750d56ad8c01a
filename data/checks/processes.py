"""One function over many items in several processes, which may die of an item.

Each process reports item by item, so the item that it died on is known: it is tried once more, alone in a
fresh process, and given up if that process ends as well. All other items get their result.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import ceil
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import TypeVar

_NUM_GIVEN = 32  # items that a process is handed at a time

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Died:
    """In place of a result: two processes ended while they had the item. how: the exit status in words."""

    how: str


def apply(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    workers: int,
    on_progress: Callable[[int, int], None],
) -> list[tuple[Item, Result | Died]]:
    """function(item) of all items, in the order in which they were done, from `workers` processes.

    function and items have to be picklable; items are hashable and not None. on_progress: called with the
    items done and the items in all, at the start and after each. Raises ValueError for less than one worker,
    RuntimeError where a process ends before it has begun."""
    if workers < 1:
        raise ValueError(f"workers is {workers}, must be at least 1")
    context = multiprocessing.get_context("forkserver")  # a fork of this process could inherit a held lock
    waiting, suspects = deque(items), set[Item]()
    running: dict[Connection, tuple[BaseProcess, deque[Item | None]]] = {}  # None: has yet to say it is ready
    results: list[tuple[Item, Result | Died]] = []

    def start(batch: list[Item]) -> None:
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(function, theirs, batch), daemon=True)
        process.start()
        theirs.close()  # so that the pipe closes when the process ends
        running[ours] = process, deque([None, *batch])

    def end(connection: Connection) -> str:
        process, _ = running.pop(connection)
        connection.close()
        process.join()
        code = process.exitcode or 0
        return signal.Signals(-code).name if code < 0 else f"exit status {code}"

    def next_batch() -> list[Item]:
        return [waiting.popleft() for _ in range(min(_NUM_GIVEN, ceil(len(waiting) / workers)))]

    try:
        on_progress(0, len(items))
        for _ in range(min(workers, len(items))):
            start(next_batch())
        while running:
            for connection in wait(list(running)):
                assert isinstance(connection, Connection)
                given = running[connection][1]
                try:
                    result: Result | Died = connection.recv()
                    item = given.popleft()
                except (EOFError, OSError):
                    item, how = given.popleft(), end(connection)
                    if item is None:
                        raise RuntimeError(
                            f"a worker process ended before its first item, with {how}"
                        ) from None
                    waiting.extendleft(other for other in reversed(given) if other is not None)
                    if item not in suspects:
                        suspects.add(item)
                        start([item])
                        continue
                    result = Died(how)
                    if waiting:
                        start(next_batch())
                if item is not None:
                    results.append((item, result))
                    on_progress(len(results), len(items))
                if connection not in running or given:
                    continue
                if not waiting:
                    end(connection)
                    continue
                given.extend(batch := next_batch())
                with suppress(OSError):  # it has ended, which the next round will hear
                    connection.send(batch)
    finally:
        for process, _ in running.values():
            process.terminate()
        for connection in list(running):
            end(connection)
    return results


def _work(function: Callable[[Item], object], connection: Connection, batch: list[Item]) -> None:
    """What a process does: say that it is ready, then one result an item, until nobody listens any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    with suppress(EOFError, BrokenPipeError):
        connection.send(None)
        while True:
            for item in batch:
                connection.send(function(item))
            batch = connection.recv()
