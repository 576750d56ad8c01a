"""Weights that act or learn past their mask: refused when masking, found before training, or at the first
compressed step."""

import copy
import logging
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

from sparsity import (
    ACDC,
    GlobalMagnitude,
    MaskError,
    PhaseSchedule,
    UniformMagnitude,
    find_escaping,
    mask_layers,
)

SCHEDULE = PhaseSchedule.parse("dense 1, sparse 2, dense 1")
STEPS = 4


class Net(nn.Module):
    """With a layer `past` whose weight a functional call takes where `functional_use` says so."""

    def __init__(self, functional_use="never"):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.past, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.functional_use = functional_use

    def forward(self, x):
        x = self.first(x).relu()
        past = self.functional_use == "always" or (self.functional_use == "in training" and self.training)
        x = functional.linear(x, self.past.weight, self.past.bias) if past else self.past(x)
        return functional.softmax(self.last(x.relu()), 1)


def train(net, acdc, optimizer, penalty=lambda net: 0.0, steps=SCHEDULE.num_epochs * STEPS):
    for number in range(steps):
        acdc.before_step()
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(number))
        loss = (net(x) - 0.3).square().sum() + penalty(net)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def make(net, **arguments):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    acdc = ACDC(net, GlobalMagnitude(0.5), SCHEDULE, STEPS, **arguments)
    acdc.attach(optimizer)
    return acdc, optimizer


@pytest.mark.parametrize(
    ("functional_use", "penalty", "layers"),
    [
        ("in training", lambda net: 0.0, ["past"]),
        ("never", lambda net: (net.last.weight - 0.1).square().sum(), ["last"]),
        ("always", lambda net: (net.first.weight.sum() - 1).square() / 100, ["first", "past"]),
    ],
    ids=["functional call", "penalty", "both"],
)
def test_what_leaks_is_named_after_the_first_compressed_step(functional_use, penalty, layers):
    net = Net(functional_use)
    acdc, optimizer = make(net)
    with pytest.raises(MaskError, match=rf"dropped weights are no longer 0, in {layers[0]} \(") as failure:
        train(net, acdc, optimizer, penalty)
    assert failure.value.layers == layers
    assert acdc.step == STEPS + 1  # the call that would begin the second compressed step
    with pytest.raises(MaskError):
        acdc.export()


def test_divergence_is_no_leak():
    net = Net()
    acdc, optimizer = make(net)
    train(net, acdc, optimizer, steps=STEPS + 1)
    with torch.no_grad():
        net.past.weight.fill_(float("nan"))
    acdc.check_masks()


def test_a_leak_is_found_where_no_step_is_seen():
    """An optimizer that steps as another one than the attached, its hooks unheard."""
    net = Net("in training")
    acdc, _ = make(net)
    with pytest.raises(MaskError):
        train(net, acdc, torch.optim.SGD(net.parameters(), lr=0.1), steps=STEPS + 2)


def test_a_copy_asks_for_its_own_optimizer():
    net = Net()
    acdc, _ = make(net)
    for copied in (copy.deepcopy(acdc), pickle.loads(pickle.dumps(acdc))):
        with pytest.raises(RuntimeError, match="attach"):
            copied.before_step()
        train(copied.model, copied, attached(copied), steps=2)


def attached(acdc):
    optimizer = torch.optim.SGD(acdc.model.parameters(), lr=0.1)
    acdc.attach(optimizer)
    return optimizer


def test_a_leak_that_begins_later_is_found_as_the_phase_ends():
    net = Net()
    acdc, optimizer = make(net)
    train(net, acdc, optimizer, steps=2 * STEPS)
    acdc.check_masks()
    with torch.no_grad():
        net.past.weight.add_(1e-30)  # whoever does that
    with pytest.raises(MaskError, match=r"in past \("):
        train(net, acdc, optimizer, steps=STEPS + 1)
    assert acdc.step == 3 * STEPS + 1


def test_a_run_resumed_within_a_phase_is_checked_again():
    net = Net("in training")
    acdc, optimizer = make(net)
    train(net, acdc, optimizer, steps=STEPS)
    acdc.before_step()
    state, weights = acdc.state_dict(), net.state_dict()
    again = Net("in training")
    second, optimizer = make(again)
    again.load_state_dict(weights)
    second.load_state_dict(state)
    with pytest.raises(MaskError):
        train(again, second, optimizer, steps=2)


def test_nothing_is_read_from_the_device_between_switches(monkeypatch):
    net = Net()
    acdc, optimizer = make(net)
    looks = []
    check = acdc.check_masks
    monkeypatch.setattr(acdc, "check_masks", lambda: (looks.append(acdc.step), check()))
    train(net, acdc, optimizer)
    assert looks == [STEPS + 1, 3 * STEPS + 1]  # after the phase's first step, and at its end


@pytest.mark.parametrize(
    ("functional_use", "names"), [("always", ["past"]), ("in training", []), ("never", [])]
)
def test_functional_use_is_found_before_training(functional_use, names):
    net = Net(functional_use).train()
    net.norm = nn.BatchNorm1d(3).eval()
    net.register_buffer("passes", torch.zeros(()))
    net.register_forward_hook(lambda *_: (net.passes.add_(1), torch.rand(1), None)[-1])
    layers = mask_layers(net)
    layers["first"].mask[0] = False
    before = {name: value.clone() for name, value in net.state_dict().items()}
    random = torch.get_rng_state()
    with torch.no_grad():
        assert find_escaping(net, layers, torch.randn(2, 6, generator=torch.Generator())) == names
    assert torch.equal(torch.get_rng_state(), random)
    assert net.training
    assert not net.norm.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_models_that_are_no_plain_functions_of_one_tensor_are_left_to_the_first_step():
    class Pair(Net):
        def forward(self, x):
            return super().forward(x), x

    net = Pair("always")
    assert find_escaping(net, mask_layers(net), torch.randn(2, 6)) == []

    class Fails(Net):
        def forward(self, x):
            raise RuntimeError("incompatible with .grad()")

    fails = Fails()
    assert find_escaping(fails, mask_layers(fails), torch.randn(2, 6)) == []
    assert fails.training
    broken = Net("never")
    broken.first.weight.data.fill_(float("nan"))
    assert find_escaping(broken, mask_layers(broken), torch.randn(2, 6)) == []


@pytest.mark.parametrize(
    "parametrize",
    [weight_norm, spectral_norm, parametrizations.weight_norm, parametrizations.spectral_norm],
    ids=["weight_norm", "spectral_norm", "parametrized weight_norm", "parametrized spectral_norm"],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of torch's older functions
def test_weights_computed_from_others_are_refused_by_name(parametrize):
    net = Net()
    net.past = parametrize(net.past)
    with pytest.raises(ValueError, match="layer 'past' computes its weight from other parameters"):
        mask_layers(net)
    assert type(net.first) is nn.Linear
    assert list(mask_layers(net, exclude=["past"])) == ["first", "last"]


def test_weights_shared_with_anything_are_refused_by_name():
    class Tied(nn.Module):
        def __init__(self, share):
            super().__init__()
            self.embedding, self.head = nn.Embedding(9, 4), nn.Linear(4, 9)
            share(self)

    def tie(net):
        net.head.weight = net.embedding.weight

    def alias(net):
        net.head.weight.data = net.embedding.weight.data

    def buffer(net):
        net.register_buffer("average", net.head.weight.detach())

    for share, other in ((tie, "embedding.weight"), (alias, "embedding.weight"), (buffer, "average")):
        with pytest.raises(ValueError, match=f"layer 'head' shares its weight with {other}"):
            mask_layers(Tied(share))
    assert list(mask_layers(Tied(lambda net: None))) == ["head"]
    sparse = torch.eye(3).to_sparse()
    assert list(mask_layers(Tied(lambda net: net.register_buffer("adjacency", sparse)))) == ["head"]

    twice = nn.ModuleDict({"a": nn.Linear(4, 4)})
    twice["b"] = twice["a"]  # one layer under two names: every use goes through its mask
    assert list(mask_layers(twice)) == ["a"]


def test_frozen_layers_stay_unmasked_and_keep_their_weights(caplog):
    net = Net()
    net.past.weight.requires_grad_(False)
    before = net.past.weight.clone()
    acdc, optimizer = make(net)
    assert list(acdc.layers) == ["first", "last"]
    assert "frozen layers stay unmasked: past" in caplog.text
    train(net, acdc, optimizer)
    assert torch.equal(net.past.weight, before)
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="no layer is left to mask: all that are chosen are frozen"):
        mask_layers(net, include=["past"])

    later = Net()
    acdc = ACDC(later, GlobalMagnitude(0.5), SCHEDULE, STEPS)
    later.past.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="layer 'past' is masked and frozen"):
        acdc.attach(torch.optim.SGD(later.parameters(), lr=0.1))


def test_a_layer_that_keeps_nothing_is_warned_of_by_name(caplog):
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 40))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    acdc = ACDC(net, UniformMagnitude(0.9), PhaseSchedule.parse("sparse 1"), STEPS)
    acdc.attach(optimizer)
    with caplog.at_level(logging.WARNING):
        acdc.before_step()
    assert "layer 0 keeps none of its 4 weights" in caplog.text
    assert "layer 2" not in caplog.text


def test_scripting_is_refused_in_a_sentence():
    net = Net("never")
    acdc, _ = make(net)
    with pytest.raises(ValueError, match=r"torch.jit.script does not take masked layers: script acdc.export"):
        torch.jit.script(net)
    exported, x = torch.jit.script(acdc.export().eval()), torch.randn(2, 6)
    assert torch.equal(exported(x), net.eval()(x))


@pytest.fixture
def one_rank(tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("torch without distributed")
    ours = not torch.distributed.is_initialized()  # an earlier test's run keeps its group
    if ours:
        torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    if ours:
        torch.distributed.destroy_process_group()


def test_weights_sharded_by_fsdp2_are_refused_by_name(one_rank):
    from torch.distributed.fsdp import fully_shard

    net = fully_shard(Net("never"), mesh=one_rank)
    with pytest.raises(ValueError, match=r"layer 'first' is sharded by FSDP.*use DDP or ZeRO 0 to 2"):
        mask_layers(net)
    later = Net("never")
    acdc = ACDC(later, GlobalMagnitude(0.5), SCHEDULE, STEPS)
    fully_shard(later, mesh=one_rank)
    with pytest.raises(ValueError, match=r"layer 'first' is sharded by FSDP.*whole weights"):
        acdc.attach(torch.optim.SGD(later.parameters(), lr=0.1))
