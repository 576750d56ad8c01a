"""Whose turn it is, and when a turn with real data ends."""

import itertools
import subprocess
import sys
import time
from collections import Counter
from types import SimpleNamespace

import psutil
import pytest
import torch

from benchmarks.shared import turns


@pytest.mark.parametrize("names", ["ab", "abc"])
def test_every_contender_has_every_place_and_follows_every_other(names):
    orders = [turns.order(names, turn) for turn in range(2 * len(names))]
    places = Counter((name, place) for order in orders[: len(names)] for place, name in enumerate(order))
    assert set(places.values()) == {1}
    pairs = Counter(pair for order in orders for pair in itertools.pairwise(order))
    assert set(pairs) == set(itertools.permutations(names, 2))
    assert len(set(pairs.values())) == 1


def test_the_first_turn_of_a_step_does_not_count():
    calls = []
    contenders = {name: lambda name=name: calls.append(name) for name in ("ours", "stock")}
    seconds = turns.take_turns(contenders, turns=2, steps=3, device=torch.device("cpu"))
    assert "".join(name[0] for name in calls) == "ooosss" + "sssooo" + "sssooo"
    assert {name: len(values) for name, values in seconds.items()} == {"ours": 2, "stock": 2}


def test_ratios_are_turn_by_turn():
    assert turns.ratios([2, 6, 3], [1, 2, 3]) == {"median": 2, "min": 1, "max": 3}


class Process:
    """Whose processor time grows by a tick of 0.02 s from look to look, `looks` times."""

    def __init__(self, looks):
        self.looks, self.seen, self.worked_until = looks, 0, 0.0

    def children(self, recursive):
        return []

    def is_running(self):
        return True

    def cpu_times(self):
        if self.seen < self.looks:
            self.seen += 1
            self.worked_until = time.perf_counter()
        return SimpleNamespace(user=0.01 * self.seen, system=0.01 * self.seen)


def test_a_turn_ends_where_the_read_ahead_is_full(monkeypatch):
    monkeypatch.setattr(turns, "QUIET", 0.1)
    busy = Process(6)
    end = turns.until_quiet(busy)
    assert busy.seen == 6
    assert busy.worked_until <= end <= time.perf_counter() - 0.1
    before = time.perf_counter()
    assert before <= turns.until_quiet(busy) <= time.perf_counter() - 0.1


def test_threads_that_wait_busily_are_named(monkeypatch):
    monkeypatch.setattr(turns, "LONGEST", 0.1)
    with pytest.raises(SystemExit, match="OMP_WAIT_POLICY"):
        turns.until_quiet(Process(10**9))


def test_worker_processes_count():
    code = "sum(range(3_000_000)); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as worker:
        worker.stdout.readline()
        processes = turns.family()
        assert worker.pid in {process.pid for process in processes}
        assert turns.cpu_seconds(processes) >= turns.cpu_seconds([psutil.Process(worker.pid)]) > 0
        worker.communicate(b"\n")
    assert turns.cpu_seconds([process for process in processes if process.pid == worker.pid]) == 0
