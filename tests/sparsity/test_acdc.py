import copy
import gc
import itertools
import logging
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from sparsity import (
    ACDC,
    NM,
    GlobalMagnitude,
    MaskChange,
    PhaseSchedule,
    UniformMagnitude,
    measure,
    num_leaked,
    relative_mask_difference,
)
from trainer.models import get_model

SCHEDULE = PhaseSchedule.parse("dense 1, (sparse 1, dense 1) x2, sparse 2")
STEPS = 4  # per epoch


def make_net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10)
    )


def sgd(net, **arguments):
    defaults = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3}
    return torch.optim.SGD(net.parameters(), **{**defaults, **arguments})


def make_acdc(net, optimizer, pattern=None, **arguments) -> ACDC:
    acdc = ACDC(net, pattern or GlobalMagnitude(0.9), SCHEDULE, STEPS, **arguments)
    acdc.attach(optimizer)
    return acdc


def started(seed: int = 0):
    """A network, its optimizer, and ACDC attached to both."""
    net = make_net(seed)
    optimizer = sgd(net)
    return net, optimizer, make_acdc(net, optimizer)


def one_step(net, optimizer, number):
    generator = torch.Generator().manual_seed(number)
    x, y = torch.randn(6, 1, 8, 8, generator=generator), torch.randint(0, 10, (6,), generator=generator)
    nn.functional.cross_entropy(net(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()


def train(net, optimizer, acdc, start, end):
    for number in range(start, end):
        acdc.before_step()
        one_step(net, optimizer, number)


class Stages(nn.Module):
    """With a layer named as the README's example excludes it."""

    def __init__(self):
        super().__init__()
        self.layer1 = nn.Sequential(make_net())
        self.layer2 = nn.ModuleDict({"downsample": nn.Sequential(nn.Conv2d(1, 1, 1))})

    def forward(self, x):
        return self.layer1(self.layer2["downsample"](x))


def test_the_readmes_example_runs_as_it_stands():
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    model = Stages()
    names = {
        "model": model,
        "optimizer": sgd(model),
        "loss_fn": nn.functional.cross_entropy,
        "loader": [(torch.randn(6, 1, 8, 8), torch.randint(0, 10, (6,))) for _ in range(3)],
    }
    exec(example, names)
    acdc = names["acdc"]
    assert list(acdc.masks()) == ["layer1.0.0", "layer1.0.4"]
    assert acdc.step == 3 * 14
    assert measure(model, acdc.masks()).overall == pytest.approx(0.9, abs=1e-3)
    assert num_leaked(acdc.weights(), acdc.masks()) == 0


@pytest.mark.parametrize("pattern", [GlobalMagnitude(0.9), UniformMagnitude(0.8), NM(1, 4)])
@pytest.mark.parametrize(
    "momentum", [{"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, {"momentum": 0}]
)
def test_dropped_weights_stay_zero_and_momentum_is_reset(pattern, momentum):
    net = make_net()
    optimizer = sgd(net, **momentum)
    acdc = make_acdc(net, optimizer, pattern, exclude=[] if not isinstance(pattern, NM) else ["0"])
    for number in range(SCHEDULE.num_epochs * STEPS):
        before = {name: weight.clone() for name, weight in acdc.weights().items()}
        dropped = {name: ~mask.clone() for name, mask in acdc.masks().items()}
        acdc.before_step()
        epoch, at_switch = divmod(number, STEPS)
        if at_switch == 0 and epoch in SCHEDULE.decompressions:
            assert all(mask.all() for mask in acdc.masks().values())
            assert all((before[name][dropped[name]] == 0).all() for name in before)
            states = [
                value
                for state in optimizer.state.values()
                for value in state.values()
                if torch.is_tensor(value)
            ]
            assert all((value == 0).all() for value in states)
            assert len(states) == (len(list(net.parameters())) if momentum["momentum"] else 0)
        if at_switch == 0 and epoch in SCHEDULE.compressions:
            chosen = pattern(before)
            for name, layer in acdc.layers.items():
                assert torch.equal(layer.mask, chosen[name])
                assert torch.equal(layer.weight, before[name] * chosen[name])
                buffer = optimizer.state[layer.weight].get("momentum_buffer")
                assert buffer is None or (buffer[~layer.mask] == 0).all()
        one_step(net, optimizer, number)
        assert num_leaked(acdc.weights(), acdc.masks()) == 0
    assert measure(net, acdc.masks()).overall == pytest.approx(pattern.sparsity, abs=2 / 80)


def test_weights_other_than_the_dropped_go_on_from_where_they_were():
    net, optimizer, acdc = started()
    norm_momentum = None
    for number in range(2 * STEPS):
        if number == STEPS:
            norm_momentum = optimizer.state[net[1].weight]["momentum_buffer"].clone()
        acdc.before_step()
        if number == STEPS:  # compression leaves the momentum of what it keeps, and of unmasked parameters
            assert torch.equal(optimizer.state[net[1].weight]["momentum_buffer"], norm_momentum)
            assert (optimizer.state[net[0].weight]["momentum_buffer"][net[0].mask] != 0).all()
        one_step(net, optimizer, number)


@pytest.mark.parametrize("make_optimizer", [torch.optim.Adam, torch.optim.AdamW])
def test_adam_family(make_optimizer):
    net = make_net()
    optimizer = make_optimizer(net.parameters(), lr=1e-3, weight_decay=1e-2)
    acdc = make_acdc(net, optimizer)
    for number in range(SCHEDULE.num_epochs * STEPS):
        acdc.before_step()
        if number and number == SCHEDULE.decompressions[0] * STEPS:
            assert all((optimizer.state[p]["exp_avg"] == 0).all() for p in net.parameters())
        one_step(net, optimizer, number)
        assert num_leaked(acdc.weights(), acdc.masks()) == 0


@pytest.mark.parametrize(
    "saved_at", [2, STEPS, 2 * STEPS - 1, 2 * STEPS, 2 * STEPS + 1, 3 * STEPS, 5 * STEPS + 2]
)
def test_loading_goes_on_as_if_nothing_had_happened(saved_at):
    """At the middle of phases and right at their borders; bit for bit."""
    net, optimizer, acdc = started()
    train(net, optimizer, acdc, 0, saved_at)
    saved = copy.deepcopy((net.state_dict(), optimizer.state_dict(), acdc.state_dict()))
    end = SCHEDULE.num_epochs * STEPS
    train(net, optimizer, acdc, saved_at, end)

    again, second_optimizer, second = started(seed=1)
    for loaded, state in zip((again, second_optimizer, second), saved, strict=True):
        loaded.load_state_dict(state)
    train(again, second_optimizer, second, saved_at, end)
    assert all(
        torch.equal(a, b) for a, b in zip(again.state_dict().values(), net.state_dict().values(), strict=True)
    )
    assert second.mask_change == acdc.mask_change
    assert second.mask_difference == acdc.mask_difference
    assert second.mask_difference > 0


def test_what_changes_from_one_compression_to_the_next_is_counted():
    net = nn.Sequential(nn.Linear(5, 2, bias=False))
    acdc = ACDC(net, GlobalMagnitude(0.6), PhaseSchedule.parse("(dense 1, sparse 1) x2"), 1)
    acdc.attach(sgd(net))
    for magnitudes in ([9, 8, 7, 6, 5, 4, 3, 2, 1, 0], [9, 8, 0, 0, 0, 1, 7, 2, 6, 3]):
        acdc.before_step()
        with torch.no_grad():
            net[0].weight.copy_(torch.tensor(magnitudes).view(2, 5))
        assert acdc.mask_change is None  # nothing was compressed before
        acdc.before_step()
    assert acdc.mask_change == MaskChange(kept=2, dropped=2, regrown=2, num_weights=10)
    assert acdc.mask_difference == acdc.mask_change.relative == 0.4

    few, many = ({"fc": torch.tensor(mask).bool()} for mask in ([1, 0, 0, 1, 0], [1, 1, 1, 0, 0]))
    assert MaskChange.between(many, few) == MaskChange(kept=1, dropped=2, regrown=1, num_weights=5)
    assert relative_mask_difference(many, few) == 0.4  # 3 differ, less a growth of 1

    older = {key: value for key, value in acdc.state_dict().items() if key != "mask_change"}
    acdc.load_state_dict(older)
    assert (acdc.mask_change, acdc.mask_difference) == (None, 0.4)


def test_states_that_do_not_fit_are_refused():
    net, _, acdc = started()
    for _ in range(STEPS + 1):
        acdc.before_step()
    state = acdc.state_dict()
    other = ACDC(make_net(), GlobalMagnitude(0.9), SCHEDULE, STEPS + 1)
    with pytest.raises(ValueError, match="4 steps per epoch, this one has 5"):
        other.load_state_dict(state)
    dense = ACDC(make_net(), GlobalMagnitude(0.9), PhaseSchedule.parse("dense 9"), STEPS)
    with pytest.raises(
        ValueError, match="saved in a sparse phase at step 5, where the schedule 'dense 9' has dense"
    ):
        dense.load_state_dict(state)
    assert dense.step == 0
    net_again = make_net()
    longer = ACDC(net_again, GlobalMagnitude(0.9), PhaseSchedule.parse("dense 1, sparse 8"), STEPS)
    with pytest.raises(ValueError, match=r"drop 0 weights, .* load the model's own state_dict first"):
        longer.load_state_dict(state)
    assert longer.step == 0
    net_again.load_state_dict(net.state_dict())
    longer.load_state_dict(state)  # differs only later
    assert longer.step == STEPS + 1


def test_misuse_is_told():
    net = make_net()
    acdc = ACDC(net, GlobalMagnitude(0.9), SCHEDULE, STEPS)
    with pytest.raises(RuntimeError, match="attach"):
        acdc.before_step()
    with pytest.raises(TypeError, match="torch optimizers, or one DeepSpeed engine alone, not str"):
        acdc.attach("sgd")
    for steps in (0, -1, 2.5, 4.0, float("inf"), True, "4", None):
        with pytest.raises(ValueError, match=f"steps_per_epoch {steps!r}: a whole number of optimizer steps"):
            ACDC(make_net(), GlobalMagnitude(0.9), SCHEDULE, steps)
    assert ACDC(make_net(), GlobalMagnitude(0.9), SCHEDULE, np.int64(4)).steps_per_epoch == 4


def test_its_repr_shows_phase_step_and_sparsity():
    net, optimizer, acdc = started()
    assert repr(acdc) == "ACDC(dense, epoch 0, step 0 of 28, sparsity 0.00% in 2 layers)"
    train(net, optimizer, acdc, 0, STEPS + 1)
    assert repr(acdc) == "ACDC(sparse, epoch 1, step 5 of 28, sparsity 90.01% in 2 layers)"
    dense = ACDC(net, GlobalMagnitude(0), PhaseSchedule.parse("dense 1"), 1)
    assert repr(dense) == "ACDC(dense, epoch 0, step 0 of 1, sparsity 0.00% in 0 layers)"


@pytest.mark.parametrize(
    ("calls", "told"),
    [(0, "has taken 8 steps and before_step\\(\\) was not called"), (1, "8 steps since the only call")],
)
def test_steps_without_before_step_are_told(calls, told, caplog):
    """Never called; or once an epoch, as if it counted epochs."""
    net, optimizer, acdc = started()
    for _ in range(calls):
        acdc.before_step()
    for number in range(10):
        one_step(net, optimizer, number)
    assert len(caplog.records) == 1
    assert re.search(told, caplog.text)


@pytest.mark.parametrize(
    ("steps", "end", "told"),
    [(9, "left", True), (9, "detached", False), (28, "left", False), (4, "left", False), (0, "left", False)],
)
def test_a_loop_that_ends_before_its_schedule_is_told(steps, end, told, caplog, monkeypatch):
    gc.collect()
    monkeypatch.setattr(logging.getLogger("sparsity.guard.end"), "disabled", False)
    net, optimizer, acdc = started()
    train(net, optimizer, acdc, 0, steps)
    if end == "detached":
        acdc.detach()
    assert caplog.text == ""
    del acdc, optimizer
    gc.collect()
    message = "the loop ended with call 9 of before_step(), the schedule with call 28 (7 epochs of 4 steps)"
    assert (message in caplog.text) == told
    assert ("has stopped in dense, epoch 2" in caplog.text) == told


def test_a_detached_optimizer_steps_for_itself():
    _, optimizer, acdc = started()
    acdc.detach()
    assert not optimizer._optimizer_step_post_hooks
    with pytest.raises(RuntimeError, match="attach"):
        acdc.before_step()
    acdc.attach(optimizer)
    acdc.before_step()


def test_a_schedule_that_begins_sparse_compresses_at_once():
    net = make_net()
    acdc = ACDC(net, GlobalMagnitude(0.5), PhaseSchedule.parse("sparse 1, dense 1"), STEPS)
    acdc.attach(sgd(net))
    acdc.before_step()
    assert measure(net, acdc.masks()).overall == pytest.approx(0.5, abs=1e-3)
    for _ in range(5 * STEPS):  # beyond the end nothing more happens
        acdc.before_step()
    assert all(mask.all() for mask in acdc.masks().values())


def test_export_is_plain_and_equal():
    net, optimizer, acdc = started()
    train(net, optimizer, acdc, 0, 2 * STEPS)
    exported, x = acdc.export().eval(), torch.randn(4, 1, 8, 8)
    assert list(exported.state_dict()) == list(make_net().state_dict())
    assert torch.equal(exported(x), net.eval()(x))


@pytest.mark.slow
def test_phase_switches_do_not_recompile():
    """Four compressions and three decompressions: one graph for training, one for evaluation."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    net = get_model("resnet_cifar", num_classes=10, depth=8, width=8, in_channels=1)
    optimizer = sgd(net)
    schedule = PhaseSchedule.parse("(dense 1, sparse 1) x4")
    acdc = ACDC(net, GlobalMagnitude(0.9), schedule, STEPS)
    acdc.attach(optimizer)
    net.compile(backend="aot_eager")
    graphs = []
    for epoch, step in itertools.product(range(schedule.num_epochs), range(STEPS)):
        acdc.before_step()
        one_step(net.train(), optimizer, epoch * STEPS + step)
        if step == STEPS - 1:
            with torch.no_grad():
                net.eval()(torch.randn(6, 1, 8, 8))
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs == [2] * schedule.num_epochs
