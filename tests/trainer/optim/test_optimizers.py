"""Optimizers of recipes: their figures, what they decay, and that runs with them hold masks and resume."""

import pytest
import torch
from torch import nn

from data.torchvision_import import import_torchvision
from tests.slow import slow
from tests.trainer.distributed.small_net import SmallNet, small
from tests.trainer.runs import (
    assert_equal_states,
    build,
    final_state,
    fit_and_close,
    newest_run,
    records,
    refusal,
)
from trainer.checkpoints import checkpoint
from trainer.config.optimization import OptimizerConfig
from trainer.errors import UserError
from trainer.optim import build_optimizer
from trainer.optim.optimizers import parameter_groups

ADAMW = "optimizer={name: adamw, lr: 0.01, betas: [0.8, 0.95], weight_decay: 0.1}"
RMSPROP = "optimizer={name: rmsprop, lr: 0.002, momentum: 0.9, alpha: 0.9, eps: 0.001, weight_decay: 1e-3}"


@pytest.mark.parametrize(
    ("config", "reference"),
    [
        (
            {"name": "adamw", "betas": [0.8, 0.95], "eps": 1e-6, "weight_decay": 0.1},
            lambda p: torch.optim.AdamW(p, 0.01, (0.8, 0.95), 1e-6, 0.1, foreach=False),
        ),
        (
            {"name": "rmsprop", "momentum": 0.8, "alpha": 0.9, "eps": 1e-3, "weight_decay": 0.1},
            lambda p: torch.optim.RMSprop(p, 0.01, 0.9, 1e-3, 0.1, 0.8, foreach=False),
        ),
        ({"momentum": 0.8, "nesterov": True}, lambda p: torch.optim.SGD(p, 0.01, 0.8, nesterov=True)),
    ],
    ids=["adamw", "rmsprop", "sgd"],
)
def test_steps_are_those_of_torch(config, reference):
    nets = []
    for make in (lambda net: build_optimizer(OptimizerConfig(lr=0.01, **config), net), reference):
        torch.manual_seed(0)
        net = SmallNet(10)  # a bias before BatchNorm has no gradient but rounding
        optimizer = make(net) if not nets else make(net.parameters())
        for _ in range(4):
            optimizer.zero_grad()
            net(torch.randn(8, 1, 8, 8)).square().mean().backward()
            optimizer.step()
        nets.append(net)
    for ours, theirs in zip(*(net.parameters() for net in nets), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)


class Embeddings(nn.Module):
    def __init__(self):
        super().__init__()
        self.pos_embed = nn.Parameter(torch.ones(1, 2, 3))
        self.norm, self.fc = nn.LayerNorm(3), nn.Linear(3, 2)
        self.fc.weight.requires_grad_(False)
        self.head = nn.Linear(3, 2)

    def no_weight_decay(self):
        return {"pos_embed"}


def undecayed(net):
    config = OptimizerConfig(lr=1, weight_decay=0.1, decay_norms_and_biases=False)
    groups = build_optimizer(config, net).param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0]
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    decayed, others = ([names[id(parameter)] for parameter in group["params"]] for group in groups)
    return decayed, others


def test_norms_biases_and_what_the_model_names_can_be_left_undecayed():
    net = nn.Sequential(Embeddings())  # as within a Classifier
    assert undecayed(net) == (
        ["0.head.weight"],
        ["0.pos_embed", "0.norm.weight", "0.norm.bias", "0.fc.bias", "0.head.bias"],
    )
    for net in (nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2)):  # no group is empty
        config = OptimizerConfig(lr=1, weight_decay=0.1, decay_norms_and_biases=False)
        (group,) = build_optimizer(config, net).param_groups
        assert group["weight_decay"] == (0 if net.weight.ndim == 1 else 0.1)


def test_the_undecayed_are_timms():
    import_torchvision()  # timm does, too, where it can
    pytest.importorskip("timm", reason="timm is not installed")
    from timm.models import create_model
    from timm.optim import param_groups_weight_decay

    for name in ("vit_tiny_patch16_224", "resnet18", "convnext_atto"):
        net = create_model(name, num_classes=10)
        listed = net.no_weight_decay() if hasattr(net, "no_weight_decay") else ()
        theirs = param_groups_weight_decay(net, 0.1, no_weight_decay_list=listed)
        names = {id(parameter): name for name, parameter in net.named_parameters()}
        by_decay = {group["weight_decay"]: [names[id(p)] for p in group["params"]] for group in theirs}
        assert undecayed(net) == (by_decay[0.1], by_decay[0.0]), name


def test_by_default_all_parameters_are_one_group_as_before():
    net = SmallNet(10, norm=True)
    groups = parameter_groups(OptimizerConfig(lr=1, weight_decay=0.1), net)
    assert list(map(id, groups)) == list(map(id, net.parameters()))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["optimizer.name=adam"], "optimizer.name: should be 'sgd', 'adamw' or 'rmsprop'"),
        (["optimizer.name=adamw"], "nesterov=True belongs to sgd, not to adamw; leave it out, or replace"),
        (["optimizer={name: rmsprop, lr: 1, betas: [0.5, 0.9]}"], "belongs to adamw, not to rmsprop"),
        (["optimizer={name: adamw, lr: 1, betas: [0.5]}"], "betas [0.5] are two numbers"),
        (["optimizer={name: adamw, lr: 1, betas: [0.5, 1.0]}"], "betas [0.5, 1.0] are two numbers"),
        (["optimizer={name: rmsprop, lr: 1}", "engine.precision=fp16"], "choose optimizer.name=sgd or adamw"),
    ],
)
def test_mistakes(overrides, expected):
    assert expected in refusal(*overrides)


def run(data, root, *overrides, stop=None):
    options = ["epochs=4", "sparsity.schedule=(dense 1, sparse 1) x2", *overrides]
    trainer = build(small(data, root, "{norm: true}", *options))
    train_batch = trainer.train_batch

    def checked(batches, *rest):
        counts = train_batch(batches, *rest)
        trainer.acdc.check_masks()
        return counts

    trainer.train_batch = checked
    fit_and_close(trainer, stop)
    return trainer


@pytest.mark.usefixtures("small_net")
@pytest.mark.parametrize("stage", [0, 1, *slow(2)])
@pytest.mark.parametrize("optimizer", [ADAMW, RMSPROP], ids=["adamw", "rmsprop"])
def test_runs_hold_masks_and_resume_bit_for_bit(optimizer, stage, tiny_data, tmp_path):
    options = [optimizer, f"engine.zero_stage={stage}", "optimizer.decay_norms_and_biases=false"]
    whole = run(tiny_data, tmp_path / "whole", *options)
    assert whole.acdc.phase.kind == "sparse"
    for stop in (2, 8):  # within the first dense epoch, and the second
        root = tmp_path / f"at{stop}"
        run(tiny_data, root, *options, stop=stop)
        stopped = final_state(newest_run(root), stop)
        assert stopped["optimizer_steps"] == stop
        run(tiny_data, root, *options, "resume=auto")
        states = [final_state(newest_run(tmp_path / name), 12) for name in ("whole", root.name)]
        assert_equal_states(*states)


@pytest.mark.usefixtures("small_net")
def test_stages_train_the_same_weights(tiny_data, tmp_path):
    options = [ADAMW, "optimizer.decay_norms_and_biases=false"]
    plain, zero = (
        run(tiny_data, tmp_path / str(stage), *options, f"engine.zero_stage={stage}").acdc.model.state_dict()
        for stage in (0, 1)
    )
    for name, value in plain.items():
        assert torch.allclose(value.float(), zero[name].float(), rtol=1e-3, atol=1e-5), name


@pytest.mark.usefixtures("small_net")
def test_another_optimizers_state_is_refused(tiny_data, tmp_path):
    run(tiny_data, tmp_path, ADAMW, "save.keep=9")
    folder = newest_run(tmp_path)
    point = checkpoint.step_folder(folder / "checkpoints", 6)
    for options in ([f"resume={point}"], [f"checkpoint={point}", "sparsity.schedule=dense 4"]):
        with pytest.raises(UserError, match="its optimizer state is exp_avg, exp_avg_sq, and SGD as this"):
            run(tiny_data, tmp_path, *options)
    run(tiny_data, tmp_path, ADAMW, f"checkpoint={point}", "sparsity.schedule=dense 4")
    branch = final_state(newest_run(tmp_path), 12)
    assert branch["optimizer_steps"] == 12
    assert records(newest_run(tmp_path))[-1]["epoch"] == 3


@pytest.mark.usefixtures("small_net")
def test_states_of_sgd_are_as_before(tiny_data, tmp_path):
    run(tiny_data, tmp_path)
    assert "optimizer_steps" not in final_state(newest_run(tmp_path), 12)
