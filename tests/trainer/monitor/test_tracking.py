"""Weights & Biases: the same content as TensorBoard, in a stand-in and, where it is installed, in itself."""

import json
import struct
import sys
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.trainer.runs import build, fit_and_close, newest_run, tiny
from trainer.checkpoints.run_dir import RunDir
from trainer.errors import EnvironmentFailure
from trainer.monitor.records import Monitor
from trainer.monitor.screen import Screen
from trainer.monitor.tracking import Tracking


class FakeRun:
    def __init__(self, begun):
        self.begun, self.logged, self.finished, self.broken = begun, [], False, False

    def define_metric(self, *names, **options):
        pass

    def log(self, values):
        if self.broken:
            raise RuntimeError("no network")
        self.logged.append(values)

    def finish(self):
        self.finished = True


@pytest.fixture
def runs(monkeypatch):
    begun = []

    def init(**options):
        begun.append(FakeRun(options))
        return begun[-1]

    fake = SimpleNamespace(init=init, Settings=dict, Histogram=lambda values: values)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return begun


def in_tensorboard(folder):
    """{(tag, step): value} of all scalars, and the tags of histograms."""
    events = EventAccumulator(str(folder), {"scalars": 0, "histograms": 0}).Reload()
    scalars = {
        (tag, each.step): each.value for tag in events.Tags()["scalars"] for each in events.Scalars(tag)
    }
    return scalars, set(events.Tags()["histograms"])


def test_it_gets_what_tensorboard_gets(tmp_path, runs):
    folder = RunDir(tmp_path)
    monitor = Monitor(folder, Screen(0, 0, 0), 0, Tracking("shop", folder, {"seed": 1}))
    record = {"epoch": 0, "phase": "sparse", "lr": 0.1}
    monitor.step({**record, "step": 2, "loss": 1.5, "images_per_second": 9.0, "data_wait": 0.1})
    tested = {"train_loss": 1.25, "val_loss": 1.0, "val_top1": 50.0, "val_top5": 90.0, "sparsity": 0.9}
    speed = {"images_per_second": 9.0, "data_wait": 0.1, "graphs": 2, "seconds": 1.0}
    monitor.epoch({**record, "step": 4, **tested, **speed}, {"fc": 0.75})
    monitor.histograms(4, {"fc": torch.arange(5.0)})
    monitor.close()
    scalars, histograms = in_tensorboard(folder.tensorboard)
    (run,) = runs
    found = {
        (tag, values["step"]): value
        for values in run.logged
        for tag, value in values.items()
        if tag != "step" and tag not in histograms
    }
    assert found == pytest.approx(scalars)
    assert {tag for values in run.logged for tag in values} >= histograms == {"weights/fc"}
    assert (run.begun["project"], run.begun["config"], run.finished) == ("shop", {"seed": 1}, True)


def test_a_resumed_run_goes_on_in_the_same_one(tiny_data, tmp_path, runs):
    options = tiny(tiny_data, tmp_path, "log.wandb=shop", "epochs=2", "sparsity.schedule=dense 1, sparse 1")[
        1:
    ]
    fit_and_close(build(options), stop=7)
    resumed = f"resume={newest_run(tmp_path)}"
    build([*options, resumed]).close()
    assert runs[0].begun["id"] == runs[1].begun["id"]
    assert runs[0].begun["config"]["sparsity"]["target"] == 0.9


def test_what_fails_later_costs_no_run(tmp_path, runs, caplog):
    tracking = Tracking("shop", RunDir(tmp_path), {})
    runs[0].broken = True
    tracking.scalars({"train/loss": 1.0}, 1)
    tracking.scalars({"train/loss": 1.0}, 2)
    tracking.close()
    assert [record.getMessage() for record in caplog.records] == [
        "Weights & Biases gets no more of this run: no network"
    ]


def test_what_cannot_begin_says_what_to_do(tmp_path, runs, monkeypatch):
    def refuse(**_):
        raise RuntimeError("no API key")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    with pytest.raises(
        EnvironmentFailure, match="no API key; `wandb login` gives access, WANDB_MODE=offline"
    ):
        Tracking("shop", RunDir(tmp_path), {})
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(EnvironmentFailure, match=r"pip install 'acdc-train\[wandb\]'"):
        Tracking("shop", RunDir(tmp_path), {})


def test_the_real_one_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="pip install 'acdc-train[wandb]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = RunDir(tmp_path / "shop" / "now")
    folder.path.mkdir(parents=True)
    for steps in ((8, 16), (12,)):  # the second goes on where the first was interrupted, some steps before
        tracking = Tracking("shop", folder, {"seed": 1})
        for step in steps:
            tracking.scalars({"train/loss": step / 10}, step)
        tracking.histograms({"weights/fc": torch.arange(5.0)}, 16)
        tracking.close()
    files = sorted(folder.path.glob("wandb/offline-run-*/*.wandb"))
    assert len({file.name for file in files}) == 1 < len(files)
    logged = [values for file in files for values in in_offline_file(file)]
    assert [(values["step"], values["train/loss"]) for values in logged if "train/loss" in values] == [
        (8, 0.8),
        (16, 1.6),
        (12, 1.2),
    ]
    assert sum(any(key.startswith("weights/fc") for key in values) for values in logged) == 2


def in_offline_file(path):
    """What was logged, of a file of records in LevelDB's log format behind a header of seven bytes."""
    from wandb.proto import wandb_internal_pb2

    content, at, whole, found = path.read_bytes(), 7, b"", []
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or a last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            whole = b""
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                found.append(
                    {".".join(each.nested_key) or each.key: json.loads(each.value_json) for each in items}
                )
    return found
