"""Dropout across a stop: a run gone on with draws what the uninterrupted one would have drawn."""

import pytest
import torch

from tests.trainer.distributed.small_net import WHOLE, small
from tests.trainer.runs import assert_equal_states, build, final_state, fit_and_close, records
from trainer.checkpoints import checkpoint
from trainer.checkpoints.state import restore, seed_generators

pytestmark = pytest.mark.usefixtures("needs_runs")


def train(overrides, stop_at=None):
    trainer = build(overrides)
    fit_and_close(trainer, stop_at)
    return trainer.run_dir.path


def wide(data, run_root):
    """The paper's WideResNet, with its dropout, as small as it can be."""
    network = ["model.name=wide_resnet28_10", "model.arguments={depth: 10, width: 1, dropout: 0.3}"]
    return small(data, run_root, "{}", *network, "data.batch_size=4")


@pytest.fixture(scope="module")
def uninterrupted(tiny_data, tmp_path_factory):
    return train(wide(tiny_data, tmp_path_factory.mktemp("uninterrupted")))


@pytest.mark.parametrize("stop_at", [3, 5])
def test_stopped_in_an_epoch_or_at_its_end_and_resumed_it_equals_the_uninterrupted(
    uninterrupted, stop_at, tiny_data, tmp_path
):
    overrides = wide(tiny_data, tmp_path)
    run = train(overrides, stop_at)
    torch.manual_seed(0)  # another process would have another generator, too
    assert train([*overrides, "resume=auto"]) == run
    assert_equal_states(final_state(run, 6), final_state(uninterrupted, 6))
    losses = [
        [
            (each["kind"], each["step"], each.get("loss", each.get("val_loss")))
            for each in records(folder, None)
        ]
        for folder in (run, uninterrupted)
    ]
    assert losses[0] == losses[1]


def test_dropout_has_drawn_from_the_generator(uninterrupted):
    """Else the test above would compare nothing."""
    seed_generators(1, 1)  # as the last epoch began
    assert not torch.equal(final_state(uninterrupted, 6)["ranks"][0]["rng"]["cpu"], torch.get_rng_state())


def generator_after_restore(state, overrides):
    trainer = build(overrides)
    trainer.close()
    loader = trainer.loaders.train
    position = restore(state, trainer.engine, trainer.acdc, loader, trainer.config.seed)
    return position, torch.get_rng_state()


def test_with_another_number_of_ranks_generators_begin_at_the_place_in_the_run(
    small_net, tiny_data, tmp_path, monkeypatch
):
    """A state of one rank made one of two: neither a generator of theirs nor the build's; each rank has its
    own."""
    overrides = small(tiny_data, tmp_path, WHOLE, "save.every=1st", "save.keep=9")
    run = train(overrides)
    state = checkpoint.read(checkpoint.step_folder(run / "checkpoints", 5), checkpoint.STATE)
    position, same = generator_after_restore(state, overrides)
    assert (position.epoch, position.step) == (1, 2)
    assert torch.equal(same, state["ranks"][0]["rng"]["cpu"])
    state["ranks"] *= 2
    _, other = generator_after_restore(state, overrides)
    seen = [same, other]
    for rank, step in ((0, 2), (1, 2), (0, 1)):
        monkeypatch.setenv("RANK", str(rank))
        seed_generators(1, 1, step)
        seen.append(torch.get_rng_state())
    monkeypatch.setenv("RANK", "0")
    torch.manual_seed(1)
    seen.append(torch.get_rng_state())
    equal = {(i, j) for i in range(6) for j in range(i) if torch.equal(seen[i], seen[j])}
    assert equal == {(2, 1)}
