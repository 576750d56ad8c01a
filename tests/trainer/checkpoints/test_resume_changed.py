"""A run that goes on with another recipe, other test images or another number of threads."""

import json
import logging
import shutil

import pytest
import torch
import yaml

from tests.conftest import write_fashion_idx
from tests.trainer.runs import assert_equal_states, build, final_state, fit_and_close, newest_run, tiny
from trainer.checkpoints import checkpoint
from trainer.cli.main import main as main_of_acdc
from trainer.train import main

pytestmark = pytest.mark.usefixtures("needs_runs")

CUT = '{"cut short'
SHORT = ("epochs=3", "sparsity.schedule=dense 1, sparse 1, dense 1", "lr.warmup_epochs=0", "save.keep=9")


def short_run(data, run_root, *overrides):
    return build(tiny(data, run_root, *SHORT, *overrides)[1:])


@pytest.fixture(scope="module")
def stopped(tiny_data, tmp_path_factory):
    """Within the sparse epoch."""
    trainer = short_run(tiny_data, tmp_path_factory.mktemp("runs"))
    fit_and_close(trainer, stop=12)
    return trainer.run_dir.path


@pytest.fixture
def run(stopped, tmp_path):
    return shutil.copytree(stopped, tmp_path / "quickstart" / stopped.name)


def resume(data, run_root, *overrides):
    """As far as to its next step."""
    short_run(data, run_root, "resume=auto", *overrides).close()


def history(run):
    lines = (run / "history.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if not line.startswith(CUT)]


def test_changes_are_told_and_kept(run, tiny_data, tmp_path, caplog):
    before = yaml.safe_load((run / "config.yaml").read_text())
    caplog.set_level(logging.INFO)
    (run / "history.jsonl").write_text((run / "history.jsonl").read_text() + CUT)
    trainer = short_run(tiny_data, tmp_path, "optimizer.lr=0.02", "save.keep=3", "resume=auto")
    trainer.save_checkpoint()
    trainer.close()
    told = {record.message: record.levelname for record in caplog.records}
    assert told["optimizer.lr was 0.05, is 0.02, from step 12 on"] == "WARNING"
    assert told["save.keep was 9, is 3"] == "INFO"
    first, last = history(run)
    assert (first["step"], first["changes"]) == (0, {})
    assert first["config"]["optimizer"] == before["optimizer"]
    assert last["step"] == 12
    assert last["changes"]["optimizer.lr"] == {"then": 0.05, "now": 0.02}
    assert set(last["changes"]) == {"optimizer.lr", "save.keep", "run_root"}
    assert last["config"] == yaml.safe_load((run / "config.yaml").read_text())
    # what a later start compares with is the recipe of the checkpoint that it goes on from
    caplog.clear()
    resume(tiny_data, tmp_path, "optimizer.lr=0.02", "save.keep=3")
    assert history(run)[-1]["changes"] == {}


def test_a_dry_run_checks_the_changes_as_the_run_would(run, tiny_data, tmp_path, capsys):
    options = [*tiny(tiny_data, tmp_path, *SHORT), "resume=auto", "--dry-run"]
    for wrong, expected in (
        ("sparsity.target=0.8", "contradicts what was trained so far: sparsity.target was 0.9, is 0.8"),
        ("sparsity.schedule=dense 2, sparse 1", "was saved in a sparse phase at step 12"),
    ):
        assert main_of_acdc(["train", *options, wrong]) == 2
        assert f"resume {run}" in (said := capsys.readouterr().err)
        assert expected in said
    before = sorted(run.rglob("*"))
    assert main_of_acdc(["train", *options, "optimizer.lr=0.02"]) == 0
    assert "changed     optimizer.lr was 0.05, is 0.02" in capsys.readouterr().out
    assert sorted(run.rglob("*")) == before


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["sparsity.schedule=dense 1, sparse 2"], "whose last dense phase ended with epoch 0"),
        (["sparsity.target=0.5"], "sparsity.target was 0.9, is 0.5, and no compression follows"),
        (["data.eval_batch_size=9", "lr.gamma=0.2", "sparsity.rule=original"], "sparsity.rule was 'exact'"),
    ],
)
def test_what_contradicts_the_past_leaves_the_run_as_it_was(
    run, overrides, expected, tiny_data, tmp_path, capsys
):
    before = {path: path.read_bytes() for path in run.rglob("*.[yj]*")}
    assert main(tiny(tiny_data, tmp_path, *SHORT, "resume=auto", *overrides)) == 2
    error = capsys.readouterr().err
    assert "step-000000012: the recipe contradicts what was trained so far: " in error
    assert expected in error
    assert {path: path.read_bytes() for path in run.rglob("*.[yj]*")} == before


def test_other_test_images_are_told(run, tmp_path, caplog):
    other = write_fashion_idx(tmp_path / "other", 320, 120)
    resume(other, tmp_path)
    (told,) = [line for line in caplog.messages if "test images" in line]
    assert told.startswith("test images was '150 images, SHA-256 ")
    assert told.endswith(", from step 12 on")
    assert "test images" in history(run)[-1]["changes"]


@pytest.fixture
def with_cores(monkeypatch):
    """Sets how many cores there seem to be, for this test alone."""
    before = torch.get_num_threads()
    yield lambda number: monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(number)))
    torch.set_num_threads(before)


@pytest.mark.parametrize(("before", "cores", "now"), [(2, 4, 2), (3, 2, 2), (2, 2, 2), (None, 2, 2)])
def test_threads_are_kept_or_missed(run, before, cores, now, tiny_data, tmp_path, with_cores, caplog):
    point = checkpoint.step_folder(run / "checkpoints", 12)
    state = checkpoint.read(point, checkpoint.STATE)
    if before is None:  # a state from before they were kept
        del state["position"]["threads"], state["position"]["test_images"]
    else:
        state["position"]["threads"] = before
    checkpoint.save(point, {checkpoint.STATE: state}, checkpoint.read_info(point))
    with_cores(cores)
    caplog.set_level(logging.INFO)
    trainer = short_run(tiny_data, tmp_path, "resume=auto")
    trainer.close()
    assert torch.get_num_threads() == now
    told = [(record.levelname, record.message) for record in caplog.records if " threads " in record.message]
    expected = {
        (2, 4): ("INFO", "2 threads compute, as in the run so far, though there are cores for 4: "),
        (3, 2): ("WARNING", "the run computed with 3 threads so far and goes on with 2, for which "),
    }.get((before, cores))
    assert len(told) == (expected is not None)
    assert not told or (told[0][0] == expected[0] and told[0][1].startswith(expected[1]))
    assert trainer.position.threads == (before or now)  # with cores enough it goes back to its own


def test_a_run_moved_to_more_cores_is_the_uninterrupted_one(tiny_data, tmp_path, with_cores):
    with_cores(1)
    whole = short_run(tiny_data, tmp_path / "whole")
    fit_and_close(whole, stop=8)
    fit_and_close(short_run(tiny_data, tmp_path), stop=4)
    with_cores(2)
    fit_and_close(short_run(tiny_data, tmp_path, "resume=auto"), stop=8)
    assert_equal_states(*(final_state(newest_run(root), 8) for root in (tmp_path / "whole", tmp_path)))
