"""Subcommands other than train, in this process."""

import json
import multiprocessing
import os
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from data.datasets import fashion_mnist
from tests.conftest import write_fashion_idx
from trainer.cli.main import main


def test_schedule_shows_phases_and_learning_rates(capsys):
    assert main(["schedule", "quickstart", "optimizer.lr=0.2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("dense 2, sparse 1, dense 1, sparse 1, dense 5, sparse 4    GlobalMagnitude")
    assert lines[3] == "epoch   2  sparse  lr 0.197094  compress"
    assert lines[4] == "epoch   3  dense   lr 0.188546  decompress"
    assert lines[14].startswith("epoch  13  sparse  lr 0.0029")
    assert lines[16].startswith("phase     ░")  # the drawing: tests/trainer/monitor/test_drawing.py
    assert max(map(len, lines[15:])) <= 80


@pytest.mark.parametrize(("recipe", "epochs"), [("gmp", range(2, 15)), ("set", range(15))])
def test_the_schedule_shows_every_compression_within_a_phase(recipe, epochs, capsys):
    assert main(["schedule", f"fashion_mnist/{recipe}"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.endswith("  compress")]
    assert [int(line.split()[1]) for line in lines] == list(epochs)


def test_prepare_then_train_data_is_the_full_set(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ACDC_DATA", str(tmp_path / "home"))
    source = write_fashion_idx(tmp_path / "idx", 64, 16)
    assert main(["prepare", "fashion-mnist", str(source)]) == 0
    stored = Path(capsys.readouterr().out.strip().removeprefix("stored in "))
    assert stored == tmp_path / "home" / "fashion-mnist" / fashion_mnist.ARCHIVE
    assert len(fashion_mnist.load(None, "train")) == 64
    assert main(["prepare", "fashion-mnist", str(tmp_path)]) == 2
    assert "no Fashion-MNIST " in capsys.readouterr().err


def test_ctrl_c_ends_a_pass_over_the_images(tmp_path, monkeypatch, capsys):
    """When the first of three files is done, and processes have the others."""

    @contextmanager
    def progress(what):
        yield lambda done, total: os.kill(os.getpid(), signal.SIGINT) if done == 1 else None

    monkeypatch.setattr("trainer.cli.progress.progress", progress)
    (tmp_path / "val").mkdir()
    for name in "abc":
        Image.new("RGB", (64, 64)).save(tmp_path / f"val/{name}.JPEG")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever ran in this process before
    try:
        assert main(["verify-data", str(tmp_path)]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert "bad files" not in capsys.readouterr().out
    assert not multiprocessing.active_children()


def write_metrics(run: Path) -> None:
    run.mkdir(parents=True)
    record = {"kind": "epoch", "val_loss": 1.0, "train_loss": 1.5, "lr": 0.1, "mask_difference": None}
    phases = [("dense", 0.0, 60.0), ("sparse", 0.9, 55.0)]
    lines = [
        json.dumps({**record, "epoch": e, "step": e + 1, "phase": p, "sparsity": s, "val_top1": a})
        for e, (p, s, a) in enumerate(phases)
    ]
    (run / "metrics.jsonl").write_text("\n".join(lines) + '\n{"kind": "epo')  # the last line cut by a crash


def test_report_of_an_unfinished_run(tmp_path):
    write_metrics(tmp_path / "quickstart" / "now")
    assert main(["report", str(tmp_path / "quickstart" / "now")]) == 0
    report = (tmp_path / "quickstart" / "now" / "report.html").read_text()
    assert report.count("<figure") > 3
    assert "not finished yet" in report
    for suffix, start in (("svg", b"<?xml"), ("png", b"\x89PNG")):
        picture = tmp_path / f"picture.{suffix}"
        assert main(["report", str(tmp_path / "quickstart" / "now"), "--picture", str(picture)]) == 0
        assert picture.read_bytes().startswith(start)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["report", "/nowhere"], "error: report: /nowhere/metrics.jsonl holds no finished epoch"),
        (["eval", "/nowhere"], "error: eval: /nowhere is not a checkpoint"),
        (["train", "quickstrat"], "did you mean 'quickstart'?"),
        (["train", "quickstart", "epochs=13"], "fills 14 epochs, but epochs is 13"),
        (["train", "quickstart", "--devices", "0"], "--devices 0: 1 or more"),
        (["train", "quickstart", "--devices", "5000"], "--devices 5000: this machine shows "),
        (["schedule", "quickstart", "lr.kin=step"], "lr.kin: unknown key; did you mean lr.kind?"),
    ],
)
def test_mistakes_end_with_code_2(arguments, expected, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert "Traceback" not in error


def test_a_batch_that_devices_cannot_share_is_said_before_any_of_them_starts(monkeypatch, capsys):
    monkeypatch.setattr("trainer.cli.launch.count_devices", lambda wanted: wanted)
    monkeypatch.setattr("trainer.cli.launch.launch", lambda *_: pytest.fail("started"))
    assert main(["train", "quickstart", "--devices", "5"]) == 2
    expected = "error: --devices 5: a batch of 64 does not divide by 5 devices x 1 accumulation steps"
    assert expected in capsys.readouterr().err
    shared = ["data.batch_size=16", "engine.accumulation_steps=4"]
    assert main(["train", "quickstart", *shared, "--devices", "8"]) == 2
    assert "does not divide by 8 devices x 4 accumulation steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [[], ["trane"], ["train"], ["eval", "x", "--quick"], ["report", "x", "--y=1"]]
)
def test_wrong_usage_ends_with_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: acdc" in capsys.readouterr().err
