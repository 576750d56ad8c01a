"""Whatever optimizer: dropped weights stay exactly 0, and no weight is shocked when they return."""

import logging
from functools import partial

import pytest
import torch
from torch import nn

from sparsity import ACDC, GlobalMagnitude, PhaseSchedule, num_leaked
from sparsity.masters import masters_of
from tests.slow import slow

STEPS = 4  # per epoch
BETAS = (0.9, 0.96)  # second moments decay to nothing within a long phase of 300 steps
SCHEDULE = PhaseSchedule.parse("dense 1, (sparse 1, dense 1) x2, sparse 2")


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24, bias=False), nn.Tanh(), nn.Linear(24, 4, bias=False))


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def started(make_optimizer=sgd, schedule=SCHEDULE, steps=STEPS, **options):
    """A network, its optimizer, and ACDC attached to both."""
    net = make_net()
    optimizer = make_optimizer(list(net.parameters()))
    acdc = ACDC(net, GlobalMagnitude(0.8), schedule, steps, **options)
    acdc.attach(optimizer)
    return net, optimizer, acdc


def one_step(net, *optimizers, number=0):
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(32, 16, generator=generator)
    y = (x[:, :4] + 0.3 * torch.randn(32, 4, generator=generator)).argmax(1)

    def closure():
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        return loss

    loss = closure()
    for optimizer in optimizers:
        optimizer.step(closure) if isinstance(optimizer, torch.optim.LBFGS) else optimizer.step()
    return loss.item()


class Blurring(torch.optim.SGD):
    """Moves a weight by its neighbour's gradient."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(parameter.grad.roll(1, 0), alpha=group["lr"])


class Wrapper(torch.optim.Optimizer):
    """As sharpness-aware minimisation is written."""

    def __init__(self, base):
        super().__init__(base.param_groups, {})
        self.base = base


@pytest.mark.parametrize(
    "make_optimizer",
    [
        lambda p: torch.optim.Muon(p, lr=0.02),
        lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
        lambda p: Blurring(p, lr=0.1),
        lambda p: torch.optim.Adafactor(p, lr=0.02),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-3),
        lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
        lambda p: torch.optim.Rprop(p, lr=1e-3),
        lambda p: torch.optim.Adagrad(p, lr=0.02),
        lambda p: torch.optim.ASGD(p, lr=0.1),
        lambda p: torch.optim.Adam(p, lr=1e-3, amsgrad=True),
    ],
    ids=["muon", "lbfgs", "own", "adafactor", "sgd", "rmsprop", "rprop", "adagrad", "asgd", "adam"],
)
def test_dropped_weights_stay_zero_after_every_step(make_optimizer):
    net, optimizer, acdc = started(make_optimizer)
    looks = moved = 0
    for number in range(SCHEDULE.num_epochs * STEPS):
        acdc.before_step()
        before = {name: weight.clone() for name, weight in acdc.weights().items()}
        one_step(net, optimizer, number=number)
        if acdc.phase.kind == "sparse":
            looks += 1
            assert num_leaked(acdc.weights(), acdc.masks()) == 0
        else:  # and most weights move in dense phases; Rprop's rest where the gradient's sign changes
            shares = [(before[name] != weight).float().mean() for name, weight in acdc.weights().items()]
            moved += min(shares) > 0.5
    assert looks == 4 * STEPS
    assert moved > STEPS


@pytest.mark.parametrize("sparse_steps", [3, *slow(300)], ids=["short phase", "long phase"])
@pytest.mark.parametrize(
    "make_optimizer",
    [
        lambda p: torch.optim.Adam(p, lr=1e-3, betas=BETAS),
        lambda p: torch.optim.AdamW(p, lr=1e-3, betas=BETAS, amsgrad=True),
        lambda p: torch.optim.NAdam(p, lr=1e-3, betas=BETAS),
        lambda p: torch.optim.Adamax(p, lr=1e-3, betas=BETAS),
        lambda p: torch.optim.RMSprop(p, lr=1e-4, alpha=BETAS[1]),
        lambda p: torch.optim.RMSprop(p, lr=1e-4, alpha=BETAS[1], momentum=0.9, centered=True),
        lambda p: torch.optim.Adadelta(p, lr=0.1),
    ],
    ids=["adam", "amsgrad", "nadam", "adamax", "rmsprop", "centered", "adadelta"],
)
def test_returning_weights_move_as_much_as_the_others(make_optimizer, sparse_steps):
    """Their second moments have decayed meanwhile: with those, Adam's first step is 30 times the others',
    RMSprop's 800 times."""
    schedule = PhaseSchedule.parse("dense 1, sparse 1, dense 1")
    net, optimizer, acdc = started(make_optimizer, schedule, sparse_steps)
    losses = []
    for number in range(2 * sparse_steps + 3):
        acdc.before_step()
        if number == 2 * sparse_steps - 1:
            dropped = {name: ~mask.clone() for name, mask in acdc.masks().items()}
        before = {name: weight.clone() for name, weight in acdc.weights().items()}
        losses.append(one_step(net, optimizer, number=number))
        if number < 2 * sparse_steps:
            continue
        for name, weight in acdc.weights().items():
            step = (weight - before[name]).abs()
            ratio = step[dropped[name]].mean() / step[~dropped[name]].mean()
            assert 0.2 < ratio < 4, f"{name}, {number - 2 * sparse_steps} steps after"


def test_adagrad_and_rprop_keep_what_never_decays():
    for make, key in ((torch.optim.Adagrad, "sum"), (torch.optim.Rprop, "step_size")):
        net, optimizer, acdc = started(partial(make, lr=0.01))
        for number in range(STEPS):
            acdc.before_step()
            one_step(net, optimizer, number=number)
        before = optimizer.state[net[0].weight][key].clone()
        acdc.before_step()
        assert acdc.phase.kind == "sparse"
        assert torch.equal(optimizer.state[net[0].weight][key], before)
        acdc.decompress()
        assert torch.equal(optimizer.state[net[0].weight][key], before)


def test_a_layer_that_lost_all_keeps_its_second_moments():
    net, optimizer, acdc = started(torch.optim.Adam)
    acdc.before_step()
    one_step(net, optimizer)
    second = optimizer.state[net[2].weight]["exp_avg_sq"]
    before = second.clone()
    acdc.compress(lambda weights: {name: weight.abs() > 1e9 for name, weight in weights.items()})
    acdc.decompress()
    assert torch.equal(second, before)


def test_several_optimizers_are_all_reset():
    net = make_net()
    first = torch.optim.SGD([net[0].weight], lr=0.1, momentum=0.9)
    second = torch.optim.Adam([net[2].weight])
    acdc = ACDC(net, GlobalMagnitude(0.8), SCHEDULE, STEPS)
    acdc.attach(first, second)
    for number in range(2 * STEPS):
        acdc.before_step()
        one_step(net, first, second, number=number)
    acdc.before_step()
    assert (first.state[net[0].weight]["momentum_buffer"] == 0).all()
    assert (second.state[net[2].weight]["exp_avg"] == 0).all()
    assert (second.state[net[2].weight]["exp_avg_sq"] > 0).all()


def test_momentum_can_be_kept():
    net, optimizer, acdc = started(reset_momentum=False)
    for number in range(2 * STEPS):
        acdc.before_step()
        one_step(net, optimizer, number=number)
    before = {p: optimizer.state[p]["momentum_buffer"].clone() for p in net.parameters()}
    acdc.before_step()
    assert acdc.phase.kind == "dense"
    assert all(torch.equal(optimizer.state[p]["momentum_buffer"], kept) for p, kept in before.items())
    assert any(kept.any() for kept in before.values())


def test_a_state_from_before_the_first_step_takes_the_momentum_away():
    net = make_net()
    optimizer = sgd(net.parameters())
    before = net[0].weight.detach().clone()
    one_step(net, optimizer)
    masters_of(optimizer).load_(net[0].weight, before, {})
    assert torch.equal(net[0].weight, before)
    assert not optimizer.state[net[0].weight]
    assert "momentum_buffer" in optimizer.state[net[2].weight]


def test_a_masked_weight_belongs_to_one_attached_optimizer(caplog):
    net, other = make_net(), make_net()
    acdc = ACDC(net, GlobalMagnitude(0.8), SCHEDULE, STEPS)
    with pytest.raises(ValueError, match=r"layer '0' belongs to none of the attached optimizers"):
        acdc.attach(sgd(other.parameters()))
    with pytest.raises(ValueError, match=r"layer '2' belongs to none"):
        acdc.attach(sgd([net[0].weight]))
    with pytest.raises(ValueError, match=r"layer '0' belongs to two"):
        acdc.attach(sgd([net[0].weight]), sgd(net.parameters()))
    for nothing in ((), (sgd(net.parameters()), "adam")):
        with pytest.raises(TypeError, match="torch optimizers, or one DeepSpeed engine alone"):
            acdc.attach(*nothing)
    with pytest.raises(TypeError, match=r"Wrapper wraps an optimizer: attach its \.base"):
        acdc.attach(Wrapper(sgd(net.parameters())))
    acdc.attach(sgd(net.parameters()))
    assert not caplog.records

    first = ACDC(make_net(), GlobalMagnitude(0.8), SCHEDULE, STEPS, include=["0"])
    first.attach(sgd([first.model[0].weight]))
    assert "belong to none of the attached optimizers" in caplog.text
    assert caplog.text.rstrip().endswith("2.weight")


@pytest.mark.parametrize("mistake", ["per micro-batch", "optimizer replaced"])
def test_calls_without_a_step_are_warned_of_once(mistake, caplog):
    plain = partial(torch.optim.SGD, lr=0.1)
    net, optimizer, acdc = started(plain)
    stepping = optimizer if mistake == "per micro-batch" else plain(net.parameters())
    with caplog.at_level(logging.WARNING):
        for number in range(20):
            acdc.before_step()
            if mistake == "optimizer replaced" or number % 2:
                one_step(net, stepping, number=number)
    assert caplog.text.count("once per optimizer step") == 1


def test_a_replaced_optimizer_is_attached_in_place_of_the_old(caplog):
    net, old, acdc = started()
    new = sgd(net.parameters())
    acdc.attach(new)
    for number in range(2 * STEPS):
        acdc.before_step()
        one_step(net, new, number=number)
    acdc.before_step()
    assert (new.state[net[0].weight]["momentum_buffer"] == 0).all()
    assert not old.state
    assert not caplog.records
