"""Runs that are killed or stopped at any moment, and gone on with until they end, against one left alone."""

from __future__ import annotations

import json
import os
import queue
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.torture.moments import KINDS
from tests.trainer.runs import (
    assert_equal_states,
    environment_of_its_own,
    final_state,
    launcher,
    newest_run,
    tiny,
)
from trainer.cli.launch import _alive, _signal_group

OPTIONS = ("save.every=5st", "save.keep=9", "resume=auto")
IN_CHAIN = 5  # kills or signals at most before a run is left to end
LONGEST = 240.0  # seconds of one process
SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT)
OF_SLURM = SIGNALS[::2]  # what SLURM sends
KILLED = (-signal.SIGKILL, 256 - signal.SIGKILL, 5)  # exit codes of a killed rank and of its launcher
MODULE = "tests.torture.moments"


@dataclass(frozen=True)
class Alone:
    """A run that was left alone, which all others must equal: its folder, the seconds that its process took,
    how often each kind of moment came."""

    run: Path
    seconds: float
    counts: dict[str, int]


class Cores:
    """Hands out cores: so many processes at a time, each kept to its own where runs have one process."""

    def __init__(self, devices: int) -> None:
        self.devices = devices
        self._free: queue.Queue[int] = queue.Queue()
        own = sorted(os.sched_getaffinity(0))
        for core in own[: max(1, len(own) // devices)]:
            self._free.put(core)
        self.number = self._free.qsize()

    def run(self, chain: Callable[[int | None], list[bool]]) -> list[bool]:
        core = self._free.get()
        try:
            return chain(core if self.devices == 1 else None)
        finally:
            self._free.put(core)


def left_alone(data: Path, root: Path, devices: int) -> Alone:
    root.mkdir(parents=True)
    counts, begin = root / "counts.json", time.monotonic()
    core = min(os.sched_getaffinity(0)) if devices == 1 else None
    code = _wait(start(data, root, devices, core, ACDC_COUNTS=str(counts)), LONGEST)
    if code != 0:
        raise RuntimeError(f"an undisturbed run ended with {code}")
    return Alone(newest_run(root), time.monotonic() - begin, json.loads(counts.read_text()))


def killed(data: Path, root: Path, alone: Alone, devices: int, most: int, seed: int) -> Iterator[bool]:
    """For each kill, `most` of them: whether its run, gone on with, ended as `alone` did. Every other kill
    comes at any time of a process, the others at the moments of KINDS in turn."""

    def chain(core: int | None, number: int, kills: int) -> list[bool]:
        place, generator = root / f"chain-{devices}-{number}", random.Random(f"{seed}-{number}")
        done, well = 0, True
        while done < kills:
            if (number + done) % 2:
                process = start(data, place, devices, core)
                code = _wait(process, generator.uniform(0.3, 1) * alone.seconds)
                well &= code in (None, 0)
                done += code is None
            else:
                kind = list(KINDS)[(number + done // 2) % len(KINDS)]
                moment = _moment(kind, alone, signal.SIGKILL, generator, devices)
                process = start(data, place, devices, core, ACDC_MOMENT=moment)
                code = _wait(process, LONGEST)  # None: the other rank, or the launcher, waits for ever
                well &= code in (0, *KILLED)
                done += code != 0  # else it had ended before
            kill(process)
        return [_ends_as(alone, data, place, devices, core) and well] * kills

    sizes = [min(IN_CHAIN, most - first) for first in range(0, most, IN_CHAIN)]
    yield from in_turns(
        devices, [lambda core, n=n, size=size: chain(core, n, size) for n, size in enumerate(sizes)]
    )


def stopped(
    data: Path, root: Path, alone: Alone, devices: int, signals: Sequence[signal.Signals], seed: int
) -> Iterator[bool]:
    """For each signal at each kind of moment: whether the exit code was the signal's, or 0 of a run that had
    ended, and the run, gone on with, ended as `alone` did. On several ranks one alone gets the signal."""

    def chain(core: int | None, number: signal.Signals) -> list[bool]:
        place, generator = root / f"signal-{devices}-{number}", random.Random(f"{seed}-{number}")
        told = []
        for kind in ("step", "switch", "write", "evaluation", "record"):
            moment = _moment(kind, alone, number, generator, devices)
            process = start(data, place, devices, core, ACDC_MOMENT=moment)
            told.append(_wait(process, LONGEST) in (0, 128 + number))
            kill(process)
        equal = _ends_as(alone, data, place, devices, core)
        return [each and equal for each in told]

    yield from in_turns(devices, [lambda core, number=number: chain(core, number) for number in signals])


def _moment(kind: str, alone: Alone, number: int, generator: random.Random, devices: int) -> str:
    """Early enough that some are left for the rest of a chain."""
    count = generator.randrange(1 + alone.counts[kind] // IN_CHAIN)
    rank = 0 if kind in ("file", "write", "record") else generator.randrange(devices)
    return f"{kind}:{count}:{int(number)}:{rank}"


def in_turns(devices: int, chains: list[Callable[[int | None], list[bool]]]) -> Iterator[bool]:
    """The outcomes of chains, so many at a time as there are cores for. Each is given its core, if one is
    enough for it."""
    cores = Cores(devices)
    with ThreadPoolExecutor(cores.number) as pool:
        for outcomes in pool.map(cores.run, chains):
            yield from outcomes


def _ends_as(alone: Alone, data: Path, place: Path, devices: int, core: int | None) -> bool:
    """Whether the newest run there, gone on with, ends with the same bits, and has its report."""
    process = start(data, place, devices, core)
    code = _wait(process, LONGEST)
    kill(process)
    runs = list((place / "quickstart").glob("*/result.json"))
    return code == 0 and bool(runs) and all(is_equal(file.parent, alone.run) for file in runs)


def start(
    data: Path,
    root: Path,
    devices: int,
    core: int | None,
    *options: str,
    said: Path | None = None,
    **variables: str,
) -> subprocess.Popen[bytes]:
    """A run's process, or its launcher. said: a file for what it says. variables: see moments."""
    arguments = tiny(data, root, *OPTIONS, *options)
    module = [sys.executable, "-m", MODULE, *arguments]
    called = module if devices == 1 else launcher(*arguments, devices=devices, module=MODULE)
    environment = {**environment_of_its_own(), **variables}
    if core is not None:
        environment["ACDC_CORE"] = str(core)
    with (said or Path(os.devnull)).open("wb") as out:
        return subprocess.Popen(called, env=environment, start_new_session=True, stdout=out, stderr=out)


def _wait(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    """Its exit code, or None when it is still running then."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


def kill(process: subprocess.Popen[bytes]) -> None:
    """And all that it has started: it leads a process group of its own."""
    while _alive(process.pid):
        _signal_group(process.pid, signal.SIGKILL)
        time.sleep(0.02)
        process.poll()
    process.wait()


def is_equal(run: Path, whole: Path) -> bool:
    try:
        assert_equal_states(final_state(run), final_state(whole))
    except (AssertionError, ValueError, OSError):
        return False
    return (run / "report.html").is_file()
