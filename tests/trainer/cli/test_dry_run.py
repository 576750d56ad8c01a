"""acdc train --dry-run: all that a run would say of itself, and nothing left behind."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.trainer.runs import tiny
from trainer.cli.main import main

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
pytest.importorskip("nvidia.dali", reason="DALI is not installed")

from trainer.cli import dry_run


def test_it_shows_recipe_phases_and_layers_and_makes_no_folder(tiny_data, tmp_path, capsys):
    runs = tmp_path / "runs"
    assert main(["train", *tiny(tiny_data, runs, "sparsity.exclude=[fc]"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    begun = [line.split()[0] for line in said.splitlines()[:4]]
    assert begun == ["loading", "loading", "reading", "building"]  # what takes seconds is said before
    assert "width: 8" in said  # the recipe, with its overrides
    assert "320 training" in said
    phases = re.findall(r"│ (dense|sparse) +│ (\d+) to (\d+)", said)
    assert phases[:3] == [("dense", "1", "1"), ("sparse", "2", "2"), ("dense", "3", "3")]
    sizes = [int(size.replace(",", "")) for size in re.findall(r"│ [\w.]+ +│ [\dx ]* +│ +([\d,]+) │", said)]
    assert sum(sizes[:-1]) == sizes[-1] > 0
    assert re.search(r"│ fc.weight +│ +[\d.]+ % │", said)
    assert "nothing was trained" in said
    assert not runs.exists()


def test_it_finds_what_a_run_would_stumble_over(tiny_data, tmp_path, capsys):
    assert main(["train", *tiny(tiny_data, tmp_path, "model.name=resnet5O"), "--dry-run"]) == 2
    assert "did you mean 'resnet50'?" in capsys.readouterr().err


def test_packed_images_may_be_shared_by_more_processes_than_its_own(monkeypatch):
    state = {"data": {"seed": 1, "shards": 8}, "position": {}}
    monkeypatch.setattr(dry_run.checkpoint, "read", lambda *_: state)
    monkeypatch.setattr(dry_run, "check_restorable", lambda state, *_: checked.update(state["data"]))
    monkeypatch.setattr(dry_run, "check_changes", lambda *_: None)
    checked = {}
    task = SimpleNamespace(acdc=None, config=None, loaders=SimpleNamespace(train=None))
    assert dry_run._changed(Path("step-1"), None, task) == []
    assert checked == {"seed": 1, "shards": 1}  # as a loader of one process has it
