"""Runs that are killed or stopped at any moment, and gone on with until they end, against one left alone."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from tests.trainer.runs import (
    assert_equal_states,
    command,
    environment_of_its_own,
    final_state,
    newest_run,
    tiny,
)

OPTIONS = ("save.every=5st", "save.keep=9")
IN_CHAIN = 5  # kills at most before a run is left to end
LONGEST = 180.0  # seconds of one process


def left_alone(data: Path, root: Path, devices: int) -> tuple[Path, float]:
    """The run that all others must equal, and the seconds that a process of it takes."""
    begin = time.monotonic()
    if (code := _wait(_start(data, root, devices), LONGEST)) != 0:
        raise RuntimeError(f"an undisturbed run ended with {code}")
    return newest_run(root), time.monotonic() - begin


def killed(
    data: Path, root: Path, whole: Path, seconds: float, devices: int, most: int, generator: random.Random
) -> Iterator[bool]:
    """For each kill, up to `most`: whether its run, gone on with, ended as `whole` did. Kills come at random
    moments of a process, which takes `seconds`, and every third within a save."""
    done = 0
    while done < most:
        place = root / f"chain-{devices}-{done}"
        kills, ended = 0, False
        while not ended:
            process = _start(data, place, devices)
            if kills == min(IN_CHAIN, most - done):
                ended = True
                code: int | None = _wait(process, LONGEST)
            else:
                moment = generator.uniform(0.05, 1.05) * seconds
                code = _wait_for_a_save(process, place, moment) if kills % 3 == 2 else _wait(process, moment)
                ended = code is not None
                kills += code is None
            _kill(process)
        equal = code == 0 and _is_equal(newest_run(place), whole)
        yield from [equal] * kills
        done += kills


def stopped(data: Path, root: Path, whole: Path, seconds: float, generator: random.Random) -> Iterator[bool]:
    """For each of three signals: whether the run said by its exit code that it has saved, or had ended, and
    ended as `whole` did once gone on with."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        place = root / f"signal-{number}"
        process = _start(data, place, 1)
        # not before it trains: until then there is nothing to save, and no one to hear it
        while process.poll() is None and not any(f.stat().st_size for f in place.glob("*/*/metrics.jsonl")):
            time.sleep(0.01)
        time.sleep(generator.uniform(0, 0.1) * seconds)
        process.send_signal(number)
        code = _wait(process, LONGEST)
        _kill(process)
        if code == 128 + number:
            code = _wait(_start(data, place, 1), LONGEST)
        yield code == 0 and _is_equal(newest_run(place), whole)


def _start(data: Path, root: Path, devices: int) -> subprocess.Popen[bytes]:
    arguments = [*tiny(data, root, *OPTIONS), "resume=auto"]
    alone = [sys.executable, "-m", "trainer.train", *arguments]
    called = alone if devices == 1 else command("train", *arguments, "--devices", str(devices))
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(called, env=environment_of_its_own(), start_new_session=True, **silent)


def _wait(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    """Its exit code, or None when it is still running then."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


def _wait_for_a_save(process: subprocess.Popen[bytes], place: Path, after: float) -> int | None:
    """As _wait, until a checkpoint is being written behind so many seconds."""
    begin = time.monotonic()
    while process.poll() is None and time.monotonic() - begin < LONGEST:
        saving = next(place.glob("*/*/checkpoints/.*.partial"), None)
        if saving is not None and time.monotonic() - begin > after / 2:
            return None
        time.sleep(0.0005)
    return process.poll()


def _kill(process: subprocess.Popen[bytes]) -> None:
    """And all that it has started."""
    try:
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    except psutil.NoSuchProcess:
        family = []
    for each in family:
        try:
            each.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family, timeout=30)
    process.wait()


def _is_equal(run: Path, whole: Path) -> bool:
    try:
        assert_equal_states(final_state(run), final_state(whole))
    except (AssertionError, ValueError, OSError):
        return False
    return True
