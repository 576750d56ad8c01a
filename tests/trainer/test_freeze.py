"""Frozen parts of a network: they keep their bits, and a run with them resumes as any other."""

import logging

import pytest
import torch

from tests.slow import slow
from tests.trainer.runs import (
    assert_equal_states,
    build,
    final_state,
    fit_and_close,
    newest_run,
    run_here,
    tiny,
)
from trainer.checkpoints.saved_model import load_model
from trainer.config.optimization import OptimizerConfig
from trainer.models import get_model
from trainer.models.classifier import Classifier
from trainer.models.freeze import freeze
from trainer.optim import build_optimizer
from trainer.train import main

pytestmark = pytest.mark.usefixtures("needs_runs")
STEM = "model.freeze=[conv1, bn1, 'layer1*']"


def frozen_of(model):
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


@pytest.fixture
def resnet():
    return get_model("resnet20", 10)


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["conv1"], lambda name: name == "conv1.weight"),
        (["layer1"], lambda name: name.startswith("layer1.")),
        (["layer[12]", "bn1"], lambda name: name.startswith(("layer1.", "layer2.", "bn1."))),
        (["*.bn1"], lambda name: ".bn1." in name),
        (["fc.bias"], lambda name: name == "fc.bias"),
    ],
)
def test_patterns_name_modules_and_parameters(resnet, patterns, expected):
    freeze(resnet, patterns)
    assert frozen_of(resnet) == {name for name, _ in resnet.named_parameters() if expected(name)}


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (
            ["layr1"],
            "'layr1' names no part of the model; did you mean 'layer1'.*Its parts: conv1, bn1",
        ),
        (["*"], "leave nothing to train"),
    ],
)
def test_what_cannot_be_frozen(resnet, patterns, expected):
    with pytest.raises(ValueError, match=expected):
        freeze(resnet, patterns)
    assert not frozen_of(resnet)


def test_a_frozen_batch_norm_keeps_its_statistics(resnet):
    told = freeze(resnet, ["layer1", "bn1.weight"])
    assert told == "layer1, bn1.weight: 5.1 % of the parameters, 6 BatchNorms"
    classifier = Classifier(resnet, (0.5,) * 3, (0.5,) * 3)
    before = {name: value.clone() for name, value in resnet.named_buffers()}
    classifier.eval()
    classifier.train()
    classifier(torch.randint(0, 256, (4, 3, 32, 32)).float(), torch.zeros(4, dtype=torch.int64))
    moved = {name for name, value in resnet.named_buffers() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if not name.startswith("layer1.")}


def test_the_optimizer_has_no_frozen_parameters(resnet):
    freeze(resnet, ["layer*", "conv1", "bn1"])
    for options in ({}, {"decay_norms_and_biases": False, "weight_decay": 0.1}):
        groups = build_optimizer(OptimizerConfig(lr=0.1, **options), resnet).param_groups
        assert {id(each) for group in groups for each in group["params"]} == set(
            map(id, resnet.fc.parameters())
        )


@pytest.mark.parametrize("stage", [0, *slow(1), 2])
def test_frozen_weights_keep_their_bits_and_a_run_resumes(tiny_data, tmp_path, stage, caplog):
    caplog.set_level(logging.WARNING, "sparsity")
    options = [f"engine.zero_stage={stage}", STEM, "optimizer.weight_decay=0.1"]
    options += ["sparsity.recompute_batch_norm=2st", "save.every=7st", "save.keep=20"]
    arguments = tiny(tiny_data, tmp_path, *options)
    trainer = build(arguments[1:])
    first = {name: value.clone() for name, value in trainer.acdc.model.state_dict().items()}
    assert trainer.task.notes["frozen"].startswith("conv1, bn1, layer1*: ")
    fit_and_close(trainer, stop=24)
    run = newest_run(tmp_path)
    assert main([*arguments, f"resume={run}"]) == 0
    model = load_model(run / "checkpoints" / "sparse")[0].state_dict()
    frozen = [name for name in model if name.startswith(("conv1", "bn1", "layer1"))]
    assert len(frozen) > 10
    for name, value in model.items():
        assert torch.equal(value, first[name].contiguous()) == (name in frozen), name
    assert "frozen layers stay unmasked: conv1, layer1.0.conv1" in caplog.text
    whole = run_here(tiny_data, tmp_path / "whole", *options)
    assert_equal_states(final_state(run), final_state(whole))
