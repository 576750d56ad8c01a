"""What make gpu-check runs, leaves out and keeps, and its real run, in small, on a CPU."""

import importlib
import io
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu_check
from benchmarks.gpu import real_run
from benchmarks.gpu_check import Part
from tests.trainer.runs import OF_A_RANK

TREE = Path(gpu_check.__file__).parents[1]


def part(name, code, **others):
    """Of Python code; a record goes to `out`."""
    begin = "import json, pathlib, sys, time; out = pathlib.Path(sys.argv[-1])"
    module = f"{begin}\n{code}"
    return Part(name, (), others.pop("least", 1), others.pop("most", 60), module, "it", **others)


@pytest.fixture
def _parts(monkeypatch, tmp_path):
    """Let parts be code, in modules made of it."""
    folder = tmp_path / "modules"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(folder))

    def split(command):
        name = f"part{abs(hash(command))}"
        (folder / f"{name}.py").write_text(command)
        return [name]

    monkeypatch.setattr(gpu_check.shlex, "split", split)


def test_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu-check"])
    assert gpu_check.main() == 0
    assert "left out, torch sees no GPU" in capsys.readouterr().out


def test_what_is_missing_is_named_with_what_it_costs(tmp_path):
    def outcome(part, left):
        return gpu_check.run(part, left, tmp_path, io.StringIO())

    missing = Part("x", ("torch", "nowhere.at.all"), 1, 1, "benchmarks.x", "training from files")
    assert outcome(missing, 100) == (
        0,
        "left out: nowhere.at.all not installed: no figure of training from files",
    )
    late = Part("x", (), 30, 60, "benchmarks.x", "x")
    assert outcome(late, 20)[1] == "left out: 20 s are left of the time for all: no figure of x"
    broken = Part("x", (), 1, 60, "benchmarks.nowhere", "x")
    assert outcome(broken, 60)[1] == "failed: exit code 1"


@pytest.mark.usefixtures("_parts")
def test_a_part_that_takes_too_long_loses_nothing(tmp_path, capfd):
    slow = part("slow", "out.write_text('{}'); print('so far', flush=True); time.sleep(60)", most=3)
    log = io.StringIO()
    seconds, outcome = gpu_check.run(slow, 100, tmp_path, log)
    assert 3 <= seconds < 20
    assert outcome == "failed: it took too long; what it had measured is kept"
    assert (tmp_path / "slow.json").exists()
    assert "so far" in log.getvalue()
    assert "so far" in capfd.readouterr().out


@pytest.mark.usefixtures("_parts")
def test_a_failing_part_stops_no_other_and_small_records_are_merged(monkeypatch, tmp_path):
    parts = (
        part("first", "raise SystemExit(3)"),
        part("large", "out.write_text('[1]')"),
        part("small", "out.write_text('[2]')", small=True),
        part("other", "out.write_text('[3]')"),
    )
    monkeypatch.setattr(gpu_check, "PARTS", parts)
    out = tmp_path / "out"
    outcomes = gpu_check.check(out, ["first", "large", "small"], 100)
    assert [found["outcome"] for found in outcomes.values()] == ["failed: exit code 3", "passed", "passed"]
    assert {path.name for path in out.iterdir()} == {"gpu_check.json", "log.txt", "large.json"}
    record = json.loads((out / "gpu_check.json").read_text())
    assert record["records"] == {"small": [2]}
    assert list(record["parts"]) == ["first", "large", "small"]
    assert record["environment"]["packages"]


@pytest.mark.usefixtures("_parts")
def test_time_is_kept_for_tests_and_they_have_a_log_of_their_own(monkeypatch, tmp_path):
    parts = (part("early", "print('early said')"), part("late", "print('late said')", least=30))
    monkeypatch.setattr(gpu_check, "PARTS", (*parts, part("tests", "print('tests said')", least=30)))
    monkeypatch.setattr(gpu_check, "KEPT", 40)
    found = gpu_check.check(tmp_path, ["early", "late", "tests"], 60)
    assert found["late"]["outcome"].startswith("left out: ")
    assert found["early"]["outcome"] == found["tests"]["outcome"] == "passed"
    assert "early said" in (tmp_path / "log.txt").read_text()
    assert "tests said" not in (tmp_path / "log.txt").read_text()
    assert "tests said" in (tmp_path / "tests.log").read_text()
    assert gpu_check.check(tmp_path, ["late"], 60)["late"]["outcome"] == "passed"


def test_tests_come_last_and_limits_keep_within_the_budget():
    assert gpu_check.PARTS[-1].name == "tests"
    assert gpu_check.PARTS[-1].least <= gpu_check.KEPT
    assert all(part.least <= part.most <= gpu_check.BUDGET for part in gpu_check.PARTS)


@pytest.mark.parametrize("part", gpu_check.PARTS, ids=lambda part: part.name)
def test_every_parts_command_is_understood(monkeypatch, tmp_path, part):
    """By its own parser: options, names of variants."""
    module, *arguments = shlex.split(part.command)
    if module == "pytest":
        assert (TREE / arguments[-1]).is_dir()
        return
    monkeypatch.setattr(sys, "argv", [module, *arguments, "--out", str(tmp_path / "x.json"), "--help"])
    with pytest.raises(SystemExit) as ended:  # at --help, which comes behind all that is read
        importlib.import_module(module).main()
    assert ended.value.code == 0


def test_the_folder_stays_small():
    large = [part for part in gpu_check.PARTS if not part.small and part.name != "tests"]
    others = ["gpu_check.json", "log.txt", "tests.log", "of a small part that runs"]
    assert len(large) + len(others) <= 8


def test_a_test_loss_of_millions_is_no_fault_and_one_that_is_no_number_is(tmp_path):
    def verdict(*losses):
        epochs = [{"kind": "epoch", "phase": "dense", "train_loss": 9.1, "val_loss": loss} for loss in losses]
        (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, epochs)))
        found = {"verdicts": {}, "resumed": {"said": [], "exit_code": 0}}
        real_run.read_run(tmp_path, found)
        return found["verdicts"]["finite losses"]

    assert verdict(2.2e7, 6.9, 87.8)
    assert not verdict(2.2e7, math.nan, 87.8)
    assert not verdict(math.inf)
    assert not verdict(None)
    assert not verdict()


STUBBORN = """
import os, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: None)  # as a run does, which saves and stops when it likes
place = pathlib.Path(sys.argv[-1]).with_suffix(".pid")
place.with_suffix(".new").write_text(str(os.getpid()))
place.with_suffix(".new").rename(place)
time.sleep(120)
"""
TERMINATED = """
import pathlib, sys, torch
from benchmarks import gpu_check
torch.cuda.is_available, torch.cuda.get_device_name = lambda: True, lambda: "none"
gpu_check.PARTS = (gpu_check.Part("variants", (), 1, 120, "stubborn", "it"),)
raise SystemExit(gpu_check.main())
"""


def test_what_is_stopped_takes_its_part_with_it(tmp_path):
    (tmp_path / "stubborn.py").write_text(STUBBORN)
    paths = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    command = [sys.executable, "-c", TERMINATED, "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": paths})
    place = tmp_path / "out" / "variants.pid"
    try:
        while not place.exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 128 + signal.SIGTERM
    finally:
        process.kill()
    with pytest.raises(ProcessLookupError):
        os.kill(int(place.read_text()), 0)


@pytest.mark.rare
@pytest.mark.usefixtures("needs_runs")
def test_real_run(monkeypatch, tmp_path):
    for name in OF_A_RANK:
        monkeypatch.delenv(name, raising=False)
    small = ["model.name=mobilenetv1", "model.arguments={width: 0.25}", "data.image_size=64"]
    small += ["engine.compile=false", "sparsity.accelerate=off"]
    out = tmp_path / "record.json"
    sizes = ["--images", "64", "--batch", "16", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["real_run", *sizes, *small])
    assert real_run.main() == 0
    record = json.loads(out.read_text())
    assert all(record["verdicts"].values())
    assert len(record["verdicts"]) == 6
    assert record["resumed_at"].startswith("at epoch 1, step ")
    assert [epoch["step"] for epoch in record["epochs"]] == [4, 8, 12]
    assert record["killed"]["exit_code"] == -9
    assert "phases      dense 1, sparse 1, dense 1" in record["killed"]["said"]


def test_a_run_that_does_not_start_fails_the_check(monkeypatch, tmp_path):
    monkeypatch.setattr(real_run, "make_tree", lambda root, images, batch: root)
    out = tmp_path / "record.json"
    monkeypatch.setattr(sys, "argv", ["real_run", "--out", str(out), "such=key"])
    assert real_run.main() == 1
    record = json.loads(out.read_text())
    assert record["killed"]["exit_code"] == 2
    assert any("such: unknown key" in line for line in record["killed"]["said"])
