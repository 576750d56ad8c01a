"""What an earlier version wrote is read and resumed."""

import json
import shutil

import pytest

from tests.trainer.runs import run_here

pytestmark = pytest.mark.usefixtures("needs_runs")


def test_a_run_of_format_1_is_resumed(golden, tiny_data, tmp_path):
    """Saved within a sparse epoch; its result.json is the uninterrupted run's."""
    earlier = golden / "run_format1"
    run = shutil.copytree(earlier, tmp_path / "quickstart" / "earlier")
    (run / "result.json").unlink()
    network = ["model.name=resnet_cifar", "model.arguments={depth: 8, width: 8}"]
    assert run_here(tiny_data, tmp_path, *network, "engine.precision=fp32", f"resume={run}") == run
    ours, theirs = (json.loads((folder / "result.json").read_text()) for folder in (run, earlier))
    for model in ("dense_twin", "sparse"):
        assert ours[model]["num_kept"] == theirs[model]["num_kept"]
        assert ours[model]["loss"] == pytest.approx(theirs[model]["loss"], rel=1e-3)
