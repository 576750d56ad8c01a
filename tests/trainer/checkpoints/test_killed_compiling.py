"""Code that is compiled keeps signals waiting, until the launcher kills: all is saved before that begins."""

import pytest
import torch

from tests.trainer.runs import assert_equal_states, final_state, newest_run, run_here, tiny
from trainer.checkpoints.checkpoint import newest_whole, step_folder
from trainer.loop import Trainer
from trainer.train import main

pytestmark = pytest.mark.usefixtures("needs_runs")

RECIPE = ["engine.compile=true", "save.every=6ep", "epochs=3", "sparsity.schedule=dense 2, sparse 1"]


@pytest.fixture(scope="module", autouse=True)
def without_a_compiler():
    """Nothing is killed in torch's own code here: it need not take its time."""
    before = torch._dynamo.config.disable
    torch._dynamo.config.disable = True
    yield
    torch._dynamo.config.disable = before


@pytest.fixture(scope="module")
def uninterrupted(tiny_data, tmp_path_factory):
    return final_state(run_here(tiny_data, tmp_path_factory.mktemp("whole"), *RECIPE), 30)


@pytest.mark.parametrize(
    ("compiling", "saved"),
    [("evaluate", 10), ("accelerate", 20)],
    ids=["the first evaluation", "the first sparse step"],
)
def test_a_run_killed_while_it_compiles_has_lost_nothing(
    compiling, saved, uninterrupted, tiny_data, tmp_path, monkeypatch
):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, compiling, killed)
        assert main(tiny(tiny_data, tmp_path, *RECIPE)) == 130
    run = newest_run(tmp_path)
    assert newest_whole(run / "checkpoints") == step_folder(run / "checkpoints", saved)
    assert main(tiny(tiny_data, tmp_path, *RECIPE, "resume=auto")) == 0
    assert_equal_states(final_state(run, 30), uninterrupted)
