"""Options that users of the paper's command pass: BatchNorm statistics, histograms, mask history, short
epochs.
"""

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from data.loader import Batch
from tests.trainer.runs import assert_equal_states, build, final_state, records, run_here, tiny
from trainer import loop
from trainer.checkpoints import checkpoint
from trainer.checkpoints.mask_history import load_masks
from trainer.errors import Stopped
from trainer.evaluate import recompute_batch_norm
from trainer.train import main

pytestmark = pytest.mark.usefixtures("needs_runs")


class Batches:
    """Three batches an epoch."""

    def epoch(self, epoch, start=0):
        for index in range(start, 3):
            generator = torch.Generator().manual_seed(10 * epoch + index)
            yield Batch(torch.randn(8, 2, 4, 4, generator=generator) + index, torch.zeros(8))


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(2, momentum=0.9)

    def forward(self, images, labels):
        return self.norm(images)


@pytest.mark.parametrize("num_batches", [2, 5])
def test_recomputed_statistics_are_plain_averages(num_batches):
    module = Norm()
    module(torch.full((8, 2, 4, 4), 1e6), None)  # what was there before is gone
    batches = [*Batches().epoch(4), *Batches().epoch(5)][:num_batches]
    off = torch.autocast("cpu", enabled=False)
    recompute_batch_norm(module, Batches(), 4, num_batches, off)
    mean = torch.stack([batch.images.mean((0, 2, 3)) for batch in batches]).mean(0)
    variance = torch.stack([batch.images.var((0, 2, 3)) for batch in batches]).mean(0)
    assert torch.allclose(module.norm.running_mean, mean, atol=1e-6)
    assert torch.allclose(module.norm.running_var, variance, atol=1e-5)
    assert module.norm.momentum == 0.9
    assert not module.norm.weight.grad


def test_a_signal_while_statistics_are_recomputed(tiny_data, tmp_path, monkeypatch):
    """It would never end. What was trained is saved, and gone on with."""
    short = ["epochs=2", "sparsity.schedule=dense 1, sparse 1", "save.every=9ep", "save.keep=9"]
    short += ["sparsity.recompute_batch_norm=99999999999ep"]
    trainer = build(tiny(tiny_data, tmp_path, *short)[1:])
    recompute, came = loop.recompute_batch_norm, trainer.stop_request

    def signalled(*arguments):
        came.number = 15
        recompute(*arguments)

    monkeypatch.setattr(loop, "recompute_batch_norm", signalled)
    with pytest.raises(Stopped, match="stopped at step 10; a checkpoint is saved"):
        trainer.fit()
    trainer.close()
    state = final_state(trainer.run_dir.path, 10)
    assert (state["position"]["epoch"], state["position"]["step"]) == (1, 0)
    assert not any(name.endswith(".mask") and not mask.all() for name, mask in state["model"].items())


@pytest.mark.slow
def test_a_run_with_recomputed_statistics_resumes_exactly(tiny_data, tmp_path):
    options = ["data.augment=trivial", "sparsity.recompute_batch_norm=7st", "save.every=20st", "save.keep=9"]
    whole = run_here(tiny_data, tmp_path / "whole", *options)
    plain = run_here(tiny_data, tmp_path / "plain", "data.augment=trivial")
    assert not torch.equal(
        final_state(whole)["model"]["bn1.running_mean"], final_state(plain)["model"]["bn1.running_mean"]
    )
    point = checkpoint.step_folder(whole / "checkpoints", 20)
    expected = final_state(whole)
    resumed = run_here(tiny_data, tmp_path / "whole", *options, f"resume={point}")
    assert_equal_states(expected, final_state(resumed))


def test_weights_as_histograms_and_masks_as_history(tiny_data, tmp_path):
    run = run_here(tiny_data, tmp_path, "log.weight_histograms=true", "save.mask_history=true")
    events = EventAccumulator(str(run / "tb"), {"histograms": 0}).Reload()
    logged = {event.step: event.histogram_value for event in events.Histograms("weights/layer2.0.conv1")}
    assert sorted(logged) == [10, 20, 30, 40, 50, 60]
    masks = load_masks(run / "masks" / "epoch-0005.npz")
    assert sorted(path.name for path in (run / "masks").iterdir()) == [f"epoch-000{e}.npz" for e in (1, 3, 5)]
    state = final_state(run)["model"]
    for name, mask in masks.items():
        assert torch.equal(mask, state[f"{name}.mask"])
    assert len(masks) == sum(name.endswith(".mask") for name in state)
    # kept weights alone
    assert logged[60].num == int(masks["layer2.0.conv1"].sum()) < masks["layer2.0.conv1"].numel()
    assert logged[50].num == masks["layer2.0.conv1"].numel()


def test_short_epochs(tiny_data, tmp_path):
    run = run_here(
        tiny_data, tmp_path, "steps_per_epoch=3", "epochs=4", "sparsity.schedule=(dense 1, sparse 1) x2"
    )
    epochs = records(run)
    assert [record["step"] for record in epochs] == [3, 6, 9, 12]
    assert [record["phase"] for record in epochs] == ["dense", "sparse"] * 2


@pytest.mark.slow
def test_a_layer_without_weights_has_no_histogram(tiny_data, tmp_path):
    options = ["log.weight_histograms=true", "sparsity.target=0.999", "epochs=2"]
    run = run_here(tiny_data, tmp_path, *options, "sparsity.schedule=dense 1, sparse 1")
    events = EventAccumulator(str(run / "tb"), {"histograms": 0}).Reload()
    assert len(events.Histograms("weights/conv1")) in (1, 2)
    dense = ["log.weight_histograms=true", "epochs=1", "sparsity={schedule: dense 1}", "lr.warmup_epochs=0"]
    events = EventAccumulator(
        str(run_here(tiny_data, tmp_path / "b", *dense) / "tb"), {"histograms": 0}
    ).Reload()
    assert len(events.Histograms("weights/conv1")) == 1


def test_an_epoch_has_no_more_steps_than_images_give(tiny_data, tmp_path, capsys):
    assert main(tiny(tiny_data, tmp_path, "steps_per_epoch=11")) == 2
    assert "steps_per_epoch 11: an epoch has no more than 10 steps" in capsys.readouterr().err
