"""Kernels chosen within a training loop of one's own: by a word, before or after compilation, over whole
schedules."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional

from sparsity import ACDC, CubicSparsity, PhaseSchedule, UniformMagnitude, execution
from sparsity.gradual import settled
from sparsity.kernels.choose import NoKernelError
from sparsity.kernels.unstructured.kernel import SparseKernel
from sparsity.kernels.unstructured.library import find_compiler
from sparsity.kernels.unstructured.operator import is_innermost

needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")
SCHEDULE = "dense 1, (sparse 1, dense 1) x2, sparse 1"
STEPS = 3  # of an epoch


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, 2, 1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 16, 5),
    )


def masked(net, schedule, steps=1, optimizer=None, target=0.8, **options):
    """An ACDC object of so many steps per epoch, attached."""
    acdc = ACDC(net, UniformMagnitude(target), PhaseSchedule.parse(schedule), steps, **options)
    acdc.attach(optimizer or torch.optim.SGD(net.parameters(), 0.05, 0.9))
    return acdc


def train(net, kernels, compiled=False, autocast=False, steps=6 * STEPS, schedule=SCHEDULE, **options):
    """Losses of each step with these kernels, or chosen by that word, and the ACDC object."""
    optimizer = torch.optim.SGD(net.parameters(), 0.05, 0.9)
    acdc = masked(net, schedule, STEPS, optimizer, **options)
    random = torch.Generator().manual_seed(1)
    images, labels = torch.randn(STEPS, 6, 3, 8, 8, generator=random), torch.arange(6) % 5
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        acdc.accelerate(kernels, images[0])
    losses = []
    forward = torch.compile(lambda images: net(images), dynamic=False) if compiled else net
    for step in range(steps):
        acdc.before_step()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = functional.cross_entropy(forward(images[step % STEPS]), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, acdc


@needs_compiler
@pytest.mark.parametrize("autocast", [False, True])
def test_a_run_with_kernels_is_the_run_without(autocast):
    dense, _ = train(network(), "off", autocast=autocast)
    net = network()
    sparse, acdc = train(net, "require", autocast=autocast)
    assert sparse == pytest.approx(dense, rel=3e-2 if autocast else 1e-4)
    assert sparse != dense  # they did run
    assert all(isinstance(layer.kernel, SparseKernel) for layer in acdc.layers.values())
    acdc.check_masks()
    for layer in acdc.layers.values():
        assert layer.mask.float().mean() == pytest.approx(0.2, abs=0.03)


@needs_compiler
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch.compile's own look
def test_compiled_it_is_the_same_run_in_one_more_graph():
    eager, _ = train(network(), "require")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled, _ = train(network(), "require", compiled=True)
    assert compiled == pytest.approx(eager, rel=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert not torch._dynamo.utils.counters["graph_break"]


@needs_compiler
def test_kernels_are_chosen_at_the_next_compression_and_work_in_sparse_phases_alone():
    net = network()
    acdc = masked(net, SCHEDULE)
    acdc.accelerate("require", torch.randn(6, 3, 8, 8))
    assert not acdc.kernels
    for kind in ("dense", "sparse", "dense", "sparse"):
        acdc.before_step()
        running = [layer.kernel is not None for layer in acdc.layers.values()]
        assert running == [kind == "sparse"] * 3
    chosen = dict(acdc.kernels)
    acdc.accelerate("off")
    assert not any(layer.kernel for layer in acdc.layers.values())
    acdc.accelerate(chosen)  # as given, in a sparse phase: at once
    assert {name: layer.kernel.name for name, layer in acdc.layers.items()} == {
        name: kernel.name for name, kernel in chosen.items()
    }


@needs_compiler
def test_gradual_pruning_chooses_by_masks_near_the_last_density():
    net, gradual = network(), CubicSparsity(0.05, 0.9, start=1, end=5)
    acdc = masked(net, "dense 1, sparse 5", target=0.9, gradual=gradual)
    acdc.accelerate("require", torch.randn(6, 3, 8, 8))
    for epoch in range(6):
        acdc.before_step()
        assert len(acdc.kernels) == (3 if epoch >= settled(acdc.actions) == 3 else 0)


@needs_compiler
def test_a_state_brings_its_kernels_back():
    net = network()
    _, acdc = train(net, "require", steps=2 * STEPS)  # ends in a sparse phase
    state, weights = acdc.state_dict(), copy.deepcopy(net.state_dict())
    assert len(state["kernels"]) == 3
    other = network()
    again = masked(other, SCHEDULE, STEPS)
    other.load_state_dict(weights)
    again.load_state_dict(state)
    images = torch.randn(6, 3, 8, 8)
    assert torch.equal(net(images), other(images))
    assert {name: layer.kernel.name for name, layer in again.layers.items()} == state["kernels"]


@needs_compiler
def test_an_unpickled_run_has_kernels_again_once_attached():
    net, images = network(), torch.randn(6, 3, 8, 8)
    _, acdc = train(net, "require", steps=2 * STEPS)  # ends in a sparse phase
    net, acdc = pickle.loads(pickle.dumps((net, acdc)))
    dense = net(images)  # without plans
    acdc.attach(torch.optim.SGD(net.parameters(), 0.05))
    sparse = net(images)
    assert not torch.equal(sparse, dense)
    torch.testing.assert_close(sparse, dense)


@needs_compiler
def test_a_start_within_a_sparse_phase_uses_the_kernels():
    net = network()
    acdc = masked(net, "dense 1, sparse 3", STEPS)
    acdc.accelerate("require", torch.randn(6, 3, 8, 8))
    acdc.start_at(2, {name: torch.rand(mask.shape) < 0.2 for name, mask in acdc.masks().items()})
    assert all(isinstance(layer.kernel, SparseKernel) for layer in acdc.layers.values())


def test_without_kernels_auto_warns_and_require_ends(monkeypatch, caplog):
    monkeypatch.setattr(execution, "family_for", lambda *_: "a machine that has them")
    dense, _ = train(network(), "off")
    auto, _ = train(network(), "auto")
    assert auto == dense
    assert caplog.text.count("run masked dense layers: kernels for") == 1
    with pytest.raises(NoKernelError, match="need a machine that has them"):
        train(network(), "require")


def test_wrong_words_are_refused():
    acdc = masked(network(), SCHEDULE)
    with pytest.raises(ValueError, match="'fast' is not one of auto, off, require"):
        acdc.accelerate("fast")
    with pytest.raises(ValueError, match="an example batch says what to measure"):
        acdc.accelerate("auto")


class OwnConv2d(nn.Conv2d):
    """A subclass, as timm has."""


@needs_compiler
def test_auto_leaves_networks_alone_whose_format_would_change_within(caplog):
    """By a convolution of a kind of its own between masked ones; at the ends it does no harm."""
    for place, needs in ((3, True), (0, False)):
        net, images = network(), torch.randn(6, 3, 8, 8)
        net[place].__class__ = OwnConv2d
        acdc = masked(net, "sparse 2", exclude=[str(place)])
        acdc.accelerate("auto", images)
        acdc.before_step()
        told = "need plain torch.nn.Conv2d between them, and 3 is none" in caplog.text
        assert told == needs
        assert not (needs and acdc.kernels)
        acdc.accelerate("require", images)
        assert len(acdc.kernels) == 2
        caplog.clear()


# the second convolution is unmasked
MIDDLE_EXCLUDED = {"schedule": "sparse 2", "exclude": ["3"], "steps": 2 * STEPS}


@needs_compiler
def test_an_unmasked_convolution_between_runs_a_kernel_that_keeps_all_its_weights():
    dense, _ = train(network(), "off", **MIDDLE_EXCLUDED)
    net = network()
    sparse, acdc = train(net, "require", **MIDDLE_EXCLUDED)
    assert sparse == pytest.approx(dense, rel=1e-4)
    assert isinstance(acdc.kernels["3"], SparseKernel)
    assert list(acdc.kernel_layers) == ["0", "3", "7"]
    assert list(acdc.masks()) == ["0", "7"]
    assert "3.mask" not in net.state_dict()
    assert [type(layer) for layer in acdc.export() if hasattr(layer, "weight")] == [
        nn.Conv2d,
        nn.BatchNorm2d,
        nn.Conv2d,
        nn.BatchNorm2d,
        nn.Linear,
    ]


@needs_compiler
def test_a_dense_layer_between_changes_the_format_itself():
    dense, _ = train(network(), "off", **MIDDLE_EXCLUDED)
    names = {"0": "sparse fp32 1x1x1/40000 1x1x1/40000 1x1x1/40000", "3": "dense innermost"}
    kernels = {name: execution.kernel_named(text.replace("1x1x1", "1x4x1")) for name, text in names.items()}
    net = network()
    seen = []
    net[4].register_forward_pre_hook(lambda layer, inputs: seen.append(is_innermost(inputs[0])))
    sparse, acdc = train(net, kernels, **MIDDLE_EXCLUDED)
    assert sparse == pytest.approx(dense, rel=1e-4)
    assert seen == [True] * 6  # behind it
    assert acdc.state_dict()["kernels"]["3"] == "dense innermost"
