"""One function over many items in several processes, which may die of an item.

Each process takes a batch of items and reports one by one, so the item that it died on is known: it is tried
once more, alone in a fresh process, and given up if that process ends as well. All other items get their
result.
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
from pathlib import Path
from typing import Any, TypeVar

_BATCH = 256  # items of a process at most: it takes milliseconds to start

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Died:
    """In place of a result: two processes ended while they had the item. how: the exit status in words."""

    how: str


def apply(
    function: Callable[[Path, Item], Result],
    root: Path,
    items: Sequence[Item],
    workers: int,
    on_progress: Callable[[int, int], None],
) -> list[tuple[Item, Result | Died]]:
    """function(root, item) of all items, in the order in which they were done, from `workers` processes.

    function and items have to be picklable; items are hashable and not None. on_progress: called with the
    items done and the items in all, at the start and after each. Raises ValueError for less than one worker,
    RuntimeError where a process ends before it has begun."""
    if workers < 1:
        raise ValueError(f"workers is {workers}, must be at least 1")
    context = multiprocessing.get_context("forkserver")  # a fork of this process could inherit a held lock
    context.set_forkserver_preload([function.__module__])
    size = min(_BATCH, ceil(len(items) / (4 * workers))) or 1
    waiting = deque[Any](items[i : i + size] for i in range(0, len(items), size))
    running: dict[Any, tuple[Any, deque[Item | None]]] = {}  # None: it has yet to say that it is ready
    tried, results = set[Item](), list[tuple[Item, Result | Died]]()
    try:
        on_progress(0, len(items))
        while waiting or running:
            while waiting and len(running) < workers:
                batch, (ours, theirs) = waiting.popleft(), context.Pipe(duplex=False)
                process = context.Process(target=_work, args=(function, root, batch, theirs), daemon=True)
                process.start()
                theirs.close()  # so that the pipe closes when the process ends
                running[ours] = process, deque([None, *batch])
            connection: Any
            for connection in wait(list(running)):
                left = running[connection][1]
                try:
                    result, item = connection.recv(), left.popleft()
                except (EOFError, OSError):
                    how = _end(connection, running.pop(connection)[0])
                    if not left:
                        continue
                    item, *others = left
                    if item is None:
                        raise RuntimeError(
                            f"a worker process ended before its first item, with {how}"
                        ) from None
                    waiting.extendleft([others] if others else [])
                    if item not in tried:
                        tried.add(item)
                        waiting.appendleft([item])
                        continue
                    result = Died(how)
                if item is not None:
                    results.append((item, result))
                    on_progress(len(results), len(items))
    finally:
        for connection, (process, _) in running.items():
            process.terminate()
            _end(connection, process)
    return results


def _end(connection: Connection, process: Any) -> str:
    """Wait for a process that ends; its exit status in words."""
    connection.close()
    process.join()
    code = process.exitcode
    return signal.Signals(-code).name if code < 0 else f"exit status {code}"


def _work(
    function: Callable[[Path, Item], object], root: Path, batch: Sequence[Item], connection: Connection
) -> None:
    """What a process does: say that it is ready, then one result an item, as long as somebody listens."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    with suppress(BrokenPipeError):
        connection.send(None)
        for item in batch:
            connection.send(function(root, item))
