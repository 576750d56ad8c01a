"""Contenders that take turns, so that whatever else the machine does meets all of them.

Loaders read ahead, and decode in the background, whosever turn it is. A turn over real data is therefore
counted from a full read-ahead to a full one (until_quiet): N steps pay for N batches, and take no cores from
the next turn. The last of these batches, at most as many as are read ahead, are made while the model rests,
which a run would do beside it: turns of several times the read-ahead keep that small.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

import psutil
import torch

from benchmarks.shared.machine import wait_for
from benchmarks.shared.record import spread
from data.loader import Batch, Loader

T = TypeVar("T")
S = TypeVar("S")
TURN = 3  # steps of a turn over real data, in read-aheads
QUIET = 0.3  # seconds
PAUSE = 0.02  # seconds between looks
LITTLE = 0.015  # processor seconds: more than one of the system's ticks, less than any batch
LONGEST = 60.0  # seconds


def order(contenders: Sequence[str], turn: int) -> list[str]:
    """Who comes first, second, ... in a turn counted from 0. Over as many turns as there are contenders each
    has every place once; over twice as many each follows every other equally often."""
    rounds, first = divmod(turn, len(contenders))
    rotated = [*contenders[first:], *contenders[:first]]
    return rotated[::-1] if rounds % 2 else rotated


def take_turns(
    contenders: Mapping[str, Callable[[], Any]],
    turns: int,
    steps: int,
    device: torch.device,
    on_progress: Callable[[int, int], None] = lambda done, turns: None,
) -> dict[str, list[float]]:
    """Seconds of a step of each contender, one figure a turn of `steps` steps, for steps that read no data.
    Every contender first warms up with a turn that does not count, and compiles there. on_progress:
    called with the turns done and in all."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(turns + 1):
        for name in order(list(contenders), turn):
            wait_for(device)
            begin = time.perf_counter()
            for _ in range(steps):
                contenders[name]()
            wait_for(device)
            if turn:
                seconds[name].append((time.perf_counter() - begin) / steps)
        on_progress(turn, turns)
    return seconds


def repeat_ways(
    what: str, ways: Sequence[str], repeats: int, run: Callable[[str], T], summary: Callable[[list[T]], S]
) -> Iterator[dict[str, S]]:
    """After each run, of which a line on the screen tells: the summary of what `run` gave for each way so
    far. Ways take turns."""
    found: dict[str, list[T]] = {}
    for repeat in range(repeats):
        for way in order(ways, repeat):
            found.setdefault(way, []).append(run(way))
            print(f"{what}, {way}: {repeat + 1} of {repeats}", flush=True)
            yield {way: summary(found[way]) for way in ways if way in found}


def run_apart(function: Callable[..., T], *arguments: Any, **variables: str) -> T:
    """function(*arguments), in a process of its own with these environment variables besides."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _set, (variables,)) as process:
        return process.submit(function, *arguments).result()


def _set(variables: Mapping[str, str]) -> None:
    os.environ.update(variables)


def endless(loader: Loader) -> Iterator[Batch]:
    """The batches of all epochs."""
    return itertools.chain.from_iterable(map(loader.epoch, itertools.count()))


def ratios(over: Sequence[float], under: Sequence[float]) -> dict[str, float]:
    """Spread of the quotients, turn by turn."""
    return spread([a / b for a, b in zip(over, under, strict=True)])


def family(process: psutil.Process | None = None) -> list[psutil.Process]:
    """A process, by default this one, and all that it started."""
    head = process or psutil.Process()
    return [head, *head.children(recursive=True)]


def cpu_seconds(processes: Iterable[psutil.Process]) -> float:
    """Processor time so far. It grows by the system's ticks, of 0.01 s mostly."""
    times = [process.cpu_times() for process in processes if process.is_running()]
    return sum(t.user + t.system for t in times)


def until_quiet(process: psutil.Process | None = None) -> float:
    """Wait until a process, by default this one, and all that it started compute nothing more: their
    read-ahead is full. The time.perf_counter() since when, late by a few hundredths of a second at most.

    Raises SystemExit where that does not come about: threads that wait busily cannot be told from work."""
    processes = family(process)
    begin = since = time.perf_counter()
    before = cpu_seconds(processes)
    while time.perf_counter() - since < QUIET:
        if since - begin > LONGEST:
            raise SystemExit(
                f"the read-ahead is not full after {LONGEST:.0f} s, or threads wait busily: unset "
                "OMP_WAIT_POLICY, GOMP_SPINCOUNT and KMP_BLOCKTIME"
            )
        time.sleep(PAUSE)
        spent = cpu_seconds(processes)
        if spent - before > LITTLE:
            since, before = time.perf_counter(), spent
    return since
