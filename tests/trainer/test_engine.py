"""The engine as build_engine makes it: what a step waits for, and optimizers behind ZeRO's masters."""

import logging
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from sparsity import ACDC, GlobalMagnitude, PhaseSchedule, num_leaked
from sparsity.masters import masters_of
from trainer.config.load import load_config
from trainer.distributed import ranks
from trainer.distributed.ranks import start
from trainer.engine import build_engine, deepspeed_config
from trainer.models.classifier import Classifier

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")


class Regression(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(12, 20, bias=False), nn.Tanh(), nn.Linear(20, 3, bias=False))

    def forward(self, x, y):
        return (self.model(x) - y).square().mean()


def make_engine(make_optimizer, *overrides, module=None):
    device = start()
    options = ["data.batch_size=8", "engine.compile=false", "engine.precision=fp32"]
    config = load_config("quickstart", [*options, *overrides])
    module = module or Regression()
    optimizer = make_optimizer(module.parameters())
    return build_engine(module, optimizer, deepspeed_config(config, device), config, device)


def one_step(engine, number):
    generator = torch.Generator().manual_seed(number)
    loss = engine(torch.randn(8, 12, generator=generator), torch.randn(8, 3, generator=generator))
    engine.backward(loss)
    engine.step()


@pytest.mark.parametrize("stage", [0, 1])
def test_no_step_waits_for_the_device(stage, monkeypatch):
    """DeepSpeed's throughput timer would, from the third step on, inside the compiled region."""
    from deepspeed.accelerator import get_accelerator

    waits = []
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 10))
    engine = make_engine(
        lambda p: torch.optim.SGD(p, lr=0.1),
        "engine.compile=true",
        f"engine.zero_stage={stage}",
        module=Classifier(model, [0.5], [0.5]),
    )
    assert engine.is_compiled
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: waits.append("torch"))
    monkeypatch.setattr(type(get_accelerator()), "synchronize", lambda *_: waits.append("deepspeed"))
    for _ in range(4):
        loss, _counts = engine(torch.zeros(8, 1, 4, 4, dtype=torch.uint8), torch.arange(8))
        engine.backward(loss)
        engine.step()
    assert engine.global_steps == 4
    assert waits == []


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(
    "make_optimizer",
    [lambda p: torch.optim.AdamW(p, lr=1e-2, betas=(0.9, 0.9)), lambda p: torch.optim.RMSprop(p, alpha=0.9)],
    ids=["adamw", "rmsprop"],
)
def test_zero_masters_switch_as_plain_ones_do(stage, make_optimizer):
    """Second moments are refilled from the kept weights there too: the same weights as at stage 0."""

    def train(stage):
        engine = make_engine(make_optimizer, f"engine.zero_stage={stage}")
        schedule = PhaseSchedule.parse("dense 1, (sparse 1, dense 1) x2")
        acdc = ACDC(engine.module.model, GlobalMagnitude(0.8), schedule, steps_per_epoch=10)
        acdc.attach(engine)
        for number in range(50):
            acdc.before_step()
            one_step(engine, number)
            assert num_leaked(acdc.weights(), acdc.masks()) == 0
        return acdc.weights()

    plain, zero = train(0), train(stage)
    assert all(torch.allclose(plain[name], zero[name], rtol=1e-4, atol=1e-5) for name in plain)


@pytest.mark.parametrize("stage", [1, 2])
def test_state_of_every_parameter_group_is_reached(stage):
    """DeepSpeed links the state of the first group alone to its parameters."""

    def train(stage):
        def two_groups(parameters):
            first, *others = parameters
            return torch.optim.AdamW([{"params": [first]}, {"params": others, "weight_decay": 0.1}], lr=1e-2)

        engine = make_engine(two_groups, f"engine.zero_stage={stage}")
        schedule = PhaseSchedule.parse("dense 1, (sparse 1, dense 1) x2")
        acdc = ACDC(engine.module.model, GlobalMagnitude(0.8), schedule, steps_per_epoch=5)
        acdc.attach(engine)
        for number in range(25):
            acdc.before_step()
            one_step(engine, number)
        masters = masters_of(engine)
        return acdc.weights(), [masters.state(p)["exp_avg"] for p in engine.module.parameters()]

    (plain, plain_state), (zero, zero_state) = train(0), train(stage)
    assert all(torch.allclose(plain[name], zero[name], rtol=1e-4, atol=1e-5) for name in plain)
    for a, b in zip(plain_state, zero_state, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-6)


class Noisy(torch.optim.SGD):
    """Moves every weight a little, whatever its gradient."""

    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(1e-3)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_masters_are_masked_after_the_steps_of_optimizers_that_move_dropped_weights(stage):
    engine = make_engine(lambda p: Noisy(p, lr=0.01, momentum=0.9), f"engine.zero_stage={stage}")
    acdc = ACDC(
        engine.module.model, GlobalMagnitude(0.8), PhaseSchedule.parse("dense 1, sparse 2"), steps_per_epoch=4
    )
    acdc.attach(engine)
    for number in range(12):
        acdc.before_step()
        one_step(engine, number)
        assert num_leaked(acdc.weights(), acdc.masks()) == 0
    assert sum(int((~mask).sum()) for mask in acdc.masks().values()) == 240


@pytest.mark.parametrize("stage", [0, 1])
def test_an_engine_of_another_model_is_refused(stage, caplog):
    engine = make_engine(lambda p: torch.optim.SGD(p, lr=0.1), f"engine.zero_stage={stage}")
    acdc = ACDC(Regression().model, GlobalMagnitude(0.8), PhaseSchedule.parse("dense 1, sparse 1"), 4)
    with pytest.raises(ValueError, match="'0' belongs to none of the attached optimizers"):
        acdc.attach(engine)
    acdc = ACDC(engine.module.model, GlobalMagnitude(0.8), PhaseSchedule.parse("dense 1, sparse 1"), 4)
    with caplog.at_level(logging.WARNING):
        acdc.attach(engine)
    assert not caplog.records


def test_compiled_graphs_are_kept_by_the_instructions_that_they_need(monkeypatch, tmp_path):
    monkeypatch.setattr(ranks, "data_home", lambda: tmp_path)
    found = []
    for capability in ("AVX512", "AVX2"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda name=capability: name)
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # and so it is as before, after the test
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
        ranks._keep_compiled_graphs()
        found.append(Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]))
    assert found == [tmp_path / "compiled" / "AVX512", tmp_path / "compiled" / "AVX2"]
    assert all(folder.is_dir() for folder in found)
