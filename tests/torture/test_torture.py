"""The torture suite in short: `make torture` does far more of each, and kills."""

import pytest

from tests.torture import damage, fuzz, hostile
from tests.torture.__main__ import CLAIMS, main
from tests.trainer.runs import run_here

pytestmark = pytest.mark.usefixtures("needs_runs")


def test_damaged_and_hostile_files_and_made_up_recipes(tiny_data, tmp_path):
    run = run_here(tiny_data, tmp_path, "epochs=2", "sparsity.schedule=dense 1, sparse 1")
    for outcomes in (
        damage.damaged(run, tmp_path / "damaged", 8, 1),
        hostile.hostile(tmp_path / "scratch", every=12),
        fuzz.recipes(15, 1),
    ):
        assert all(list(outcomes))


@pytest.mark.rare
def test_a_little_of_each(tmp_path, capsys):
    out = tmp_path / "torture.json"
    few = ["--kills", "5", "--damages", "5", "--recipes", "5", "--epochs", "60", "--out", str(out)]
    assert main(few) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert all(f" {claim[:30]}" in said for claim in CLAIMS.values())
    assert out.exists()
