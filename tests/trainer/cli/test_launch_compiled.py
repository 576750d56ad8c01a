"""A compiled run by the launcher's own command. In a file of its own: it compiles for a minute."""

import json

import pytest

from tests.trainer.runs import execute, launcher, newest_run, records, tiny

pytestmark = [pytest.mark.usefixtures("needs_runs"), pytest.mark.launch, pytest.mark.rare]


def test_the_launchers_command_compiles_two_graphs_over_all_phases(tiny_data, tmp_path):
    """Three compressions and two decompressions: a graph for training, one for evaluation, no more."""
    done = execute(launcher(*tiny(tiny_data, tmp_path, "engine.compile=true")))
    assert done.returncode == 0, done.stderr
    run = newest_run(tmp_path)
    assert json.loads((run / "result.json").read_text())["compile"] == {"graphs": 2, "recompilations": 0}
    assert [record["graphs"] for record in records(run)] == [2] * 6
    lines = done.stdout.splitlines()
    assert sum(line.startswith("epoch ") and "test: loss" in line for line in lines) == 6
    for word in (
        "run folder",
        "phases",
        "dense twin",
        "sparse model",
        "2 graphs, 0 more after the first epoch",
    ):
        assert word in done.stdout, word
    assert "\x1b" not in done.stdout
