"""acdc schedule --cost: what is computed of a measurement, and the measurement itself."""

import re

import pytest
import torch

from tests.trainer.runs import tiny

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
pytest.importorskip("nvidia.dali", reason="DALI is not installed")

from sparsity import RandomMask
from sparsity.flops import LayerFlops, ModelFlops
from trainer.cli import cost
from trainer.cli.cost import Measured, seconds, training_flops, trial_of
from trainer.cli.main import main
from trainer.config.load import load_config
from trainer.monitor.flops import RunFlops

LAYERS = (LayerFlops("conv", 900, 0, ()), LayerFlops("fc", 100, 0, ()))
FLOPS = RunFlops(flops := ModelFlops(LAYERS, 0, 0, 0, 0), ((0, flops),))


def measured(**rates):
    return Measured(rates, 10, {"conv": 0.1, "fc": 0.5}, FLOPS, 100, "")


def test_flops_and_time_follow_the_phases():
    config = load_config("quickstart", [])  # 8 dense epochs, 6 sparse ones
    planned, dense = training_flops(config, measured())
    assert dense == 14 * 100 * 3 * 1000
    assert planned == pytest.approx(100 * 3 * (8 * 1000 + 6 * (90 + 50)))
    assert seconds(config, measured(dense=10.0, sparse=20.0)) == pytest.approx((8 * 10 + 6 * 5, 14 * 10))


def test_gradual_pruning_costs_by_its_sparsity():
    gradual = "sparsity.gradual={initial: 0.45, end: 3, every: 2}"
    config = load_config("quickstart", ["sparsity.schedule=dense 1, sparse 13", gradual])
    planned, _ = training_flops(config, measured())  # of the target's 90 % the one compression drops half
    assert planned == pytest.approx(100 * 3 * (1000 + 13 * (900 * 0.55 + 100 * 0.75)))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("dense 2, (sparse 1, dense 1) x6", "dense 2, sparse 2"),
        ("sparse 14", "sparse 2"),
        ("dense 14", "dense 2"),
    ],
)
def test_a_trial_has_the_phases_of_its_recipe(schedule, expected):
    config = load_config("quickstart", [f"sparsity.schedule={schedule}"])
    trial = trial_of(config, 10)
    assert trial.sparsity.schedule == expected
    assert trial.epochs == trial.sparsity.build_schedule().num_epochs
    assert (trial.sparsity.target, trial.data, trial.engine) == (0.9, config.data, config.engine)


def test_a_trial_keeps_its_masks_between_the_steps_it_measures():
    early = ["sparsity.schedule=dense 1, sparse 19", "sparsity.regrowth.end=2"]
    config = load_config("fashion_mnist/set", early)
    assert trial_of(config, 10).sparsity.build_actions() == {2: RandomMask(0.9)}


def test_a_trial_has_images_of_one_size():
    config = load_config("imagenet/resnet50_dense", ["data.image_sizes=[[0, 64], [1, 96], [3, 128]]"])
    trial = trial_of(config, 10)
    assert trial.epochs == 2
    assert trial.data.sizes == ((0, 64), (3, 96), (5, 128))
    counted = RunFlops(flops, tuple((epoch, flops) for epoch, _ in trial.data.sizes))
    assert [epoch for epoch, _ in cost._flops(config, counted).sizes] == [0, 1, 3]


def test_a_small_set_of_images_has_the_steps_that_it_has(tiny_data, tmp_path):
    config = load_config("quickstart", [*tiny(tiny_data, tmp_path)[1:], "data.batch_size=64"])
    assert cost._steps(config, torch.device("cpu")) == 5  # of 320 images
    assert cost._steps(config.model_copy(update={"steps_per_epoch": 3}), torch.device("cpu")) == 3


def test_the_command_measures_and_leaves_nothing_behind(tiny_data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cost, "STEPS", 2)
    runs = tmp_path / "runs"
    assert main(["schedule", *tiny(tiny_data, runs), "--cost"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"measured    dense phases [\d,]+ img/s and sparse phases [\d,]+ img/s\n", said)
    assert "over 2 steps each of 32 images, on 1 x " in said
    assert re.search(r"FLOPs       \S+ [MGT] of training, 0\.\d+ of dense training's\n", said)
    assert re.search(r"time        [\d.]+ minutes of training, [\d.]+ of dense training's", said)
    assert not runs.exists()
