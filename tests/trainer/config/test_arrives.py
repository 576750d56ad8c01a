"""What a recipe says of the optimizer, seen in the steps that a live run takes.

The observer sits in torch's own optimizer, below whatever DeepSpeed wraps around it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.nn import functional

from data.datasets.cifar import CIFAR10, CIFAR100
from sparsity.masters import masters_of
from tests.data.datasets.test_cifar import write_python
from tests.trainer.config.test_recipes import RECIPES
from tests.trainer.distributed.small_net import small
from tests.trainer.runs import build, records
from trainer.errors import UserError

pytestmark = pytest.mark.usefixtures("small_net")


@dataclass
class Step:
    """One step of the optimizer. group: its hyperparameters. The rest as flat vectors over the weights."""

    epoch: int
    group: dict[str, Any]
    weights: torch.Tensor
    gradients: torch.Tensor
    momentum: torch.Tensor | None
    after: torch.Tensor = field(default_factory=lambda: torch.empty(0))


class Steps(list[Step]):
    """All steps of a trainer's optimizer from now on."""

    def __init__(self, trainer: Any) -> None:
        super().__init__()
        self.acdc, self.sgd = trainer.acdc, trainer.engine.optimizer
        if trainer.config.engine.zero_stage:
            self.sgd = self.sgd.optimizer
        assert type(self.sgd) is torch.optim.SGD
        self.sgd.register_step_pre_hook(self._before)
        self.sgd.register_step_post_hook(self._after)

    def _flat(self, values: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([value.detach().flatten() for value in values])

    def _before(self, sgd: torch.optim.SGD, *_: Any) -> None:
        (group,) = sgd.param_groups
        weights = group["params"]
        momenta = [sgd.state[weight].get("momentum_buffer") for weight in weights]
        self.append(
            Step(
                (self.acdc.step - 1) // self.acdc.steps_per_epoch,
                {key: group[key] for key in ("lr", "momentum", "nesterov", "weight_decay")},
                self._flat(weights),
                self._flat([weight.grad for weight in weights]),
                None if momenta[0] is None else self._flat(momenta),
            )
        )

    def _after(self, sgd: torch.optim.SGD, *_: Any) -> None:
        self[-1].after = self._flat(sgd.param_groups[0]["params"])


RATES = [0.04, 0.08, 0.08, 0.04, 0.04, 0.02]  # two epochs of warm-up to 0.08, halved at 3 and at 5


@pytest.mark.parametrize(("stage", "nesterov"), [(0, True), (0, False), (1, True), (2, False)])
def test_every_step_of_a_run_is_sgd_with_the_recipes_figures(stage, nesterov, tiny_data, tmp_path):
    """The law by hand, with the recipe's figures: d = g + decay w; m = momentum m + d; then w falls by lr m,
    or with Nesterov's by lr (d + momentum m)."""
    figures = {"momentum": 0.8, "nesterov": nesterov, "weight_decay": 0.02}
    options = [f"optimizer={json.dumps({'lr': 0.08, **figures})}", f"engine.zero_stage={stage}"]
    options += ["lr={kind: step, milestones: [3, 5], gamma: 0.5, warmup_epochs: 2}", "steps_per_epoch=2"]
    options += ["epochs=6", "sparsity.schedule=dense 1, (sparse 1, dense 1) x2, sparse 1"]
    trainer = build(small(tiny_data, tmp_path, "{}", *options))
    steps = Steps(trainer)
    trainer.fit()
    trainer.close()
    assert [step.epoch for step in steps] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]  # steps_per_epoch
    for step in steps:
        assert step.group == {"lr": RATES[step.epoch], **figures}
        change = step.gradients + 0.02 * step.weights
        momentum = change if step.momentum is None else 0.8 * step.momentum + change
        expected = step.weights - RATES[step.epoch] * (change + 0.8 * momentum if nesterov else momentum)
        assert torch.allclose(step.after, expected, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(step.after, step.weights, rtol=1e-5, atol=1e-6)
    assert [step.momentum is None for step in steps] == [True] + [False] * 11
    assert [record["lr"] for record in records(trainer.run_dir.path)] == RATES


@pytest.mark.parametrize("stage", [0, 1])
def test_the_gradient_is_the_mean_losss_unclipped_and_unscaled(stage, tiny_data, tmp_path):
    """The first step of a run from weights five times as large, where the gradient's norm is far above 1."""
    overrides = small(tiny_data, tmp_path, "{}", f"engine.zero_stage={stage}")
    trainer = build(overrides)
    masters = masters_of(trainer.engine)
    for parameter in trainer.acdc.model.parameters():
        masters.load_(parameter, 5 * parameter.detach(), {})
    model, steps = trainer.acdc.export(), Steps(trainer)
    images, labels = (part.clone() for part in next(iter(trainer.loaders.train.epoch(0))))
    info = trainer.loaders.info
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (info.mean, info.std))
    functional.cross_entropy(model((images / 255 - mean) / std), labels).backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    trainer.train_epoch(0)
    trainer.close()
    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    assert torch.equal(steps[0].weights[: len(weights)], weights)  # ZeRO pads its vector
    assert expected.norm() > 2
    assert torch.allclose(steps[0].gradients[: len(weights)], expected, rtol=1e-4, atol=1e-5)


def test_smoothed_labels_are_what_a_run_trains_on(tiny_data, tmp_path):
    overrides = small(tiny_data, tmp_path, "{}", "loss.label_smoothing=0.2")
    trainer = build(overrides)
    model, steps = trainer.acdc.export(), Steps(trainer)
    images, labels = (part.clone() for part in next(iter(trainer.loaders.train.epoch(0))))
    info = trainer.loaders.info
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (info.mean, info.std))
    logits = model((images / 255 - mean) / std)
    functional.cross_entropy(logits, labels, label_smoothing=0.2).backward()
    trainer.fit()
    trainer.close()
    expected = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    assert torch.allclose(steps[0].gradients, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("stage", "count"), [(0, 1), (0, 2), (1, 1), (2, 2)])
def test_a_steps_gradient_is_clipped_as_a_whole_and_after_masking(stage, count, tiny_data, tmp_path):
    """With as many weights dropped as here, a norm taken before masking would be far larger."""
    seen = []
    for clip in (0.0, 0.03):
        options = [f"engine.zero_stage={stage}", f"engine.accumulation_steps={count}"]
        options += [f"optimizer.clip_norm={clip}"]
        overrides = small(tiny_data, tmp_path / str(clip), "{}", *options)
        trainer = build(overrides)
        steps = Steps(trainer)
        trainer.fit()
        trainer.close()
        seen.append(steps)
        assert trainer.acdc.phase.kind == "sparse"
    free, clipped = seen
    assert len(clipped) == 6
    assert all(step.gradients.norm() > 0.05 for step in free)
    scale = 0.03 / free[0].gradients.norm()
    assert torch.allclose(clipped[0].gradients, scale * free[0].gradients, rtol=1e-3, atol=1e-7)
    for step in clipped:
        assert step.gradients.norm().item() == pytest.approx(0.03, rel=1e-3)
    assert (clipped[-1].gradients == 0).float().mean() > 0.7


def test_clipping_is_said_in_one_place(tiny_data, tmp_path):
    (tmp_path / "ds.json").write_text('{"gradient_clipping": 2.0}')
    options = ["optimizer.clip_norm=1.0", f"engine.deepspeed={tmp_path / 'ds.json'}"]
    with pytest.raises(UserError, match=r"gradient_clipping is 2.0 there, but the recipe makes it 1.0"):
        build(small(tiny_data, tmp_path, "{}", *options))


LIVE = {  # recipes of three kinds: on which data, looked at in which epochs
    "cifar100/wide_resnet_freq20_90": (CIFAR100, (0, 75, 76, 115, 116, 155, 156, 199)),
    "cifar10/memorisation_90": (CIFAR10, (0, 65, 66, 125, 126, 185, 186, 199)),
    "imagenet/mobilenetv1_90": (None, (0, 1, 3, 4, 5, 50, 99)),
}


@pytest.mark.parametrize("recipe", LIVE)
def test_the_papers_figures_reach_the_optimizer(recipe, recorded, tmp_path):
    """Recipes with a smaller network and batch, one step in each of some epochs of theirs."""
    variant, epochs = LIVE[recipe]
    overrides = ["model.name=small", "model.arguments={}", "engine.compile=false", "steps_per_epoch=1"]
    overrides += ["sparsity.exclude=[]", "data.batch_size=20", f"run_root={tmp_path / 'runs'}"]
    if variant is None:
        overrides += ["data.backend=synthetic", "data.image_size=32", "data.eval_size=32"]
    else:
        write_python(tmp_path, variant)
        overrides += [f"data.root={tmp_path}"] + ["data.random_labels=20"] * ("memorisation" in recipe)
    trainer = build(overrides, recipe)
    assert trainer.steps_per_epoch == 1
    steps = Steps(trainer)
    for epoch in epochs:
        trainer.acdc.step, trainer.position.step = epoch, 0
        trainer.train_epoch(epoch)
    trainer.close()
    theirs = recorded[RECIPES[recipe]]
    assert [step.epoch for step in steps] == list(epochs)
    for step in steps:
        expected = {key: theirs["optimizer"][key] for key in ("momentum", "nesterov", "weight_decay")}
        assert {key: step.group[key] for key in expected} == expected
        assert step.group["lr"] == pytest.approx(theirs["lr_per_epoch"][step.epoch], rel=1e-9)


def test_two_batches_accumulated_make_the_step_of_one(tiny_data, tmp_path):
    """The same images, so the same weights to rounding; masks and counters move once a step."""
    runs = []
    for count in (1, 2):
        overrides = small(tiny_data, tmp_path, "{}", f"engine.accumulation_steps={count}")
        trainer = build(overrides)
        steps, calls, before_step = Steps(trainer), [], trainer.acdc.before_step
        trainer.acdc.before_step = lambda calls=calls, then=before_step: (calls.append(1), then())
        batches, train_batch = [], trainer.train_batch
        trainer.train_batch = lambda b, batches=batches, then=train_batch: (batches.append(1), then(b))[1]
        trainer.fit()
        trainer.close()
        assert (len(steps), len(calls), len(batches)) == (6, 6, 6 * count)
        runs.append((trainer, steps))
    (one, steps), (two, other) = runs
    for a, b in zip(steps, other, strict=True):
        assert torch.allclose(a.gradients, b.gradients, rtol=1e-4, atol=1e-6)
        assert torch.allclose(a.after, b.after, rtol=1e-4, atol=1e-6)
    for name, mask in one.acdc.masks().items():
        assert torch.equal(mask, two.acdc.masks()[name])
    assert one.position.training_flops == two.position.training_flops
