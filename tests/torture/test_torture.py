"""The torture suite in short: `make torture` does far more of each, and kills."""

import random

import pytest

from tests.torture import damage, fuzz
from tests.torture.__main__ import main
from tests.trainer.runs import run_here

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
pytest.importorskip("nvidia.dali", reason="DALI is not installed")


def test_damaged_and_hostile_files_and_recipes_with_nonsense(tiny_data, tmp_path):
    run = run_here(tiny_data, tmp_path, "epochs=2", "sparsity.schedule=dense 1, sparse 1")
    (tmp_path / "scratch").mkdir()
    for outcomes in (
        damage.damaged(run, tmp_path / "damaged", 20, random.Random(1)),
        damage.hostile(tmp_path / "scratch"),
        fuzz.recipes(40, 1),
    ):
        assert all(list(outcomes))


@pytest.mark.rare
def test_a_little_of_each(capsys):
    assert main(["--kills", "2", "--damages", "5", "--recipes", "5"]) == 0
    said = capsys.readouterr().out
    assert "killed at any moment" in said
    assert "damaged" in said
