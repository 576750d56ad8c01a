"""A benchmark that is stopped half-way leaves a record of all that it had measured."""

import json
import sys
from types import SimpleNamespace

import pytest

from benchmarks import compilation, host_memory, kernels24, overhead, peers, phase_switch

pytestmark = pytest.mark.usefixtures("needs_runs")


@pytest.fixture
def stopped(monkeypatch, tmp_path):
    """The record of a benchmark that a Ctrl-C stops."""

    def run(benchmark, *arguments):
        out = tmp_path / "record.json"
        monkeypatch.setattr(sys, "argv", ["bench", *arguments, "--out", str(out)])
        with pytest.raises(KeyboardInterrupt):
            benchmark.main()
        return json.loads(out.read_text())

    return run


def good_until(calls, result):
    """A function that gives `result` so many times, and is then stopped."""
    left = iter([result] * calls)

    def call(*arguments, **others):
        try:
            return next(left)
        except StopIteration:
            raise KeyboardInterrupt from None

    return call


def test_overhead(monkeypatch, stopped):
    monkeypatch.setattr(overhead, "measure", good_until(1, {"batch": 1}))
    assert stopped(overhead, "resnet20", "mobilenetv1")["overhead"] == {"resnet20": {"batch": 1}}


def test_phase_switch(monkeypatch, stopped):
    monkeypatch.setattr(phase_switch, "measure", good_until(2, "times"))
    assert stopped(phase_switch)["seconds"] == {"global 90 %": "times", "uniform 90 %": "times"}


def test_graphs_of_phase_switches(monkeypatch, stopped):
    monkeypatch.setattr(phase_switch, "measure", good_until(4, "times"))
    monkeypatch.setattr(phase_switch, "_train_phases", good_until(1, [1, 2]))
    record = stopped(phase_switch)
    assert record["graphs"] == {"masked": [1, 2]}
    assert len(record["seconds"]) == 4


def test_kernels24(monkeypatch, stopped):
    measured = SimpleNamespace(as_dict=lambda: {"forward": 1})
    monkeypatch.setattr(kernels24.Family24, "measure", good_until(5, measured))
    monkeypatch.setattr(kernels24, "_figures", lambda row: [""] * len(kernels24.COLUMNS))
    assert [row["forward"] for row in stopped(kernels24)["kernels"]] == [1, 1]  # by two searches each


def test_peers(monkeypatch, stopped):
    turns = 3 + 2 * 3  # of three contenders: to warm up, and two
    turn = good_until(turns, peers.Turn(2.0, 0.0))
    stub = SimpleNamespace(turn=turn, end=lambda: None)
    monkeypatch.setattr(peers, "_Contender", lambda *arguments: stub)
    found = stopped(peers, "resnet20", "--steps", "6")["peers"]["resnet20"]
    assert found["ours_over_tuned"]["median"] == 1
    assert found["images_per_second"]["ours"]["median"] == 3 * found["batch"]


def test_compilation(monkeypatch, stopped):
    run = {"first": 9.0, "steps": [1.0], "graphs": 1}
    monkeypatch.setattr(compilation, "_in_processes", good_until(2, [run, run]))
    found = stopped(compilation, "--repeats", "1")["compilation"]["resnet50"]
    assert list(found) == ["uncompiled", "blocks"]
    assert found["blocks"]["warm"]["first"]["median"] == 9


def test_host_memory(monkeypatch, stopped):
    monkeypatch.setattr(host_memory, "run_apart", good_until(3, {"ms": [5.0], "faults": 1, "memory_gb": 1}))
    found = stopped(host_memory, "resnet20", "--repeats", "2")["host_memory"]["resnet20"]
    assert {way: of["ms_per_step"]["median"] for way, of in found.items()} == {"given back": 5, "kept": 5}
