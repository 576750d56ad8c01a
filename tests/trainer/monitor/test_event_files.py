"""TensorBoard shows each step of a run once, however often it was resumed."""

import random

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainer.checkpoints.run_dir import RunDir
from trainer.monitor.records import Monitor
from trainer.monitor.screen import Screen

RECORD = {"epoch": 0, "phase": "dense", "lr": 0.1}


def log_steps(run, start, steps, loss, clock, monkeypatch):
    """As a process would that goes on from `start` and is killed behind the last of `steps`."""
    monkeypatch.setattr("time.time", lambda: clock)
    monitor = Monitor(RunDir(run), Screen(0, 0, 0), start)
    for step in steps:
        monitor.step({**RECORD, "step": step, "loss": loss, "images_per_second": 1.0, "data_wait": 0.0})
    monitor.close()
    monkeypatch.undo()


def shown(run):
    events = EventAccumulator(str(run / "tb")).Reload()
    return [(event.step, event.value) for event in events.Scalars("train/loss")]


@pytest.mark.parametrize(
    "clock",
    [(1e9, 1.1e9, 1.2e9), (1e9, 0.9e9, 0.8e9), (1e9, 1.0, 0.5)],
    ids=["clock goes on", "clock set back", "no clock"],
)
@pytest.mark.parametrize("start", [5, 8, 13, 16])
def test_no_step_is_shown_twice(start, clock, tmp_path, monkeypatch):
    """5: no record is kept of the first process."""
    log_steps(tmp_path, 0, (8, 16, 24), 1.0, clock[0], monkeypatch)
    log_steps(tmp_path, start, range(start + 1, 30), 2.0, clock[1], monkeypatch)
    log_steps(tmp_path, 20, (24, 32), 3.0, clock[2], monkeypatch)
    before = [(step, 1.0) for step in (8, 16, 24) if step <= start]
    between = [(step, 2.0) for step in range(start + 1, 21)]
    assert shown(tmp_path) == [*before, *between, (24, 3.0), (32, 3.0)]
    assert [record["step"] for record in RunDir(tmp_path).read_metrics()] == [
        step for step, _ in shown(tmp_path)
    ]


def test_damaged_files_stop_nothing(tmp_path, monkeypatch):
    log_steps(tmp_path, 0, (8, 16, 24), 1.0, 1e9, monkeypatch)
    (path,) = (tmp_path / "tb").iterdir()
    content, generator = path.read_bytes(), random.Random(0)
    for number in range(60):
        damaged = bytearray(content[: generator.randrange(len(content))] if number % 3 == 0 else content)
        for _ in range(bool(damaged)):
            damaged[generator.randrange(len(damaged))] ^= 1 << generator.randrange(8)
        for old in (tmp_path / "tb").iterdir():
            old.unlink()
        path.write_bytes(damaged)
        log_steps(tmp_path, 16, (24,), 2.0, 1e9 + 1, monkeypatch)
        assert shown(tmp_path)[-1] == (24, 2.0)
        assert (24, 1.0) not in shown(tmp_path)
