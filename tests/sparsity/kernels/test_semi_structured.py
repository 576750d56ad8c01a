"""2:4 execution against masked dense layers: values, gradients, graphs, training; by the CPU reference."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from sparsity import (
    ACDC,
    NM,
    GlobalMagnitude,
    MaskedConv2d,
    MaskedLinear,
    PhaseSchedule,
    Run24,
    Transposable24,
    mask_layers,
)
from sparsity.kernels.semi_structured.operator import conv24, missing, mm24, reason_unsupported
from sparsity.kernels.semi_structured.packing import is_24, pack24, unpack24

numbers = st.integers(-3, 3)  # with many zeros


@given(st.lists(st.lists(numbers, min_size=16, max_size=16), min_size=1, max_size=4))
def test_packing_keeps_two_of_four(rows):
    weight = torch.tensor(rows, dtype=torch.float32)
    weight *= NM(2, 4)({"w": weight})["w"]
    packed = pack24(weight)
    assert packed.values.shape == (len(rows), 8)
    assert packed.places.shape == (len(rows), 2)
    assert torch.equal(unpack24(packed), weight)
    assert is_24(weight)


def test_packing_drops_what_the_hardware_would_not_read():
    weight = torch.tensor([[1.0, 2, 3, 4, 0, 5, 6, 7]])
    assert not is_24(weight)
    assert unpack24(pack24(weight)).tolist() == [[1, 2, 0, 0, 0, 5, 6, 0]]
    with pytest.raises(ValueError, match=r"columns a multiple of 8, not \(2, 12\)"):
        pack24(torch.zeros(2, 12))


def operands(rows, outputs, inputs, pattern, dtype=torch.float64):
    torch.manual_seed(0)
    weight = torch.randn(outputs, inputs, dtype=dtype)
    weight *= pattern({"w": weight})["w"]
    return torch.randn(rows, inputs, dtype=dtype).requires_grad_(), weight.requires_grad_()


@pytest.mark.parametrize(("pattern", "transposed"), [(NM(2, 4), False), (Transposable24(), True)])
def test_the_operator(pattern, transposed):
    rows, weight = operands(24, 32, 48, pattern)
    torch.library.opcheck(mm24, (rows, weight, transposed))
    assert torch.allclose(mm24(rows, weight, transposed), functional.linear(rows, weight))


@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (2, 1)])
@pytest.mark.parametrize(("pattern", "transposed"), [(NM(2, 4), False), (Transposable24(), True)])
def test_the_convolution(pattern, transposed, stride):
    _, weight = operands(1, 32, 48, pattern)
    weight = weight.detach()[:, :, None, None].contiguous().requires_grad_()
    images = torch.randn(2, 48, 7, 4, dtype=torch.float64).to(memory_format=torch.channels_last)
    images.requires_grad_()
    arguments = (images, weight, stride, transposed, [1, 1, -1], [2, 1, -1])
    torch.library.opcheck(conv24, arguments)
    expected = gradients(functional.conv2d(images, weight, None, stride), images, weight)
    for a, b in zip(gradients(conv24(*arguments), images, weight), expected, strict=True):
        assert torch.allclose(a, b)


def test_a_transposed_run_reads_the_transpose_as_24():
    """With a mask that is 2:4 along the inputs alone, the input gradient is not the dense one: it did run."""
    rows, weight = operands(24, 32, 48, NM(2, 4))
    dense = torch.autograd.grad(functional.linear(rows, weight).sum(), rows)[0]
    assert torch.allclose(torch.autograd.grad(mm24(rows, weight, False).sum(), rows)[0], dense)
    assert not torch.allclose(torch.autograd.grad(mm24(rows, weight, True).sum(), rows)[0], dense)


def gradients(output, *inputs):
    torch.manual_seed(1)
    return output, *torch.autograd.grad((output * torch.rand_like(output)).sum(), inputs)


@pytest.mark.parametrize("run24", [Run24.FORWARD, Run24.TRANSPOSED])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_computes_what_it_computed_dense(run24, stride, bias):
    pattern = Transposable24() if run24 is Run24.TRANSPOSED else NM(2, 4)
    net = nn.Sequential(nn.Conv2d(32, 48, 1, stride, bias=bias), nn.Flatten(2), nn.Linear(16, 64, bias))
    side = 4 if stride == 1 else 7
    net = net.double().to(memory_format=torch.channels_last)
    layers = mask_layers(net)
    for name, mask in pattern({name: layer.weight for name, layer in layers.items()}).items():
        layers[name].mask.copy_(mask)
    images = torch.randn(2, 32, side, side, dtype=torch.float64).to(memory_format=torch.channels_last)
    images.requires_grad_()
    expected = gradients(net(images), images, *net.parameters())
    for layer in layers.values():
        layer.kernel = run24
    found = gradients(net(images), images, *net.parameters())
    for a, b in zip(expected, found, strict=True):
        assert torch.allclose(a, b)
    assert net[0](images).is_contiguous(memory_format=torch.channels_last)
    net.eval()
    for layer in layers.values():
        layer.kernel = Run24.NOT
    dense = net(images)
    for layer in layers.values():
        layer.kernel = run24
    assert torch.equal(net(images), dense)  # evaluation is the same graph


def test_autocast_casts_the_operands():
    rows, weight = operands(16, 32, 32, NM(2, 4), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert mm24(rows, weight, False).dtype == torch.bfloat16
        images = rows.detach().view(4, 2, 2, 32).permute(0, 3, 1, 2)
        assert conv24(images, weight.view(32, 32, 1, 1), (1, 1), False).dtype == torch.bfloat16


def test_what_does_not_fit_is_said():
    assert reason_unsupported(nn.Conv2d(64, 64, 3), 64) == "3x3 kernel"
    assert reason_unsupported(nn.Conv2d(64, 64, 1, groups=2), 64) == "groups or padding"
    assert reason_unsupported(nn.Conv2d(64, 64, 1, padding=1), 64) == "groups or padding"
    assert reason_unsupported(nn.Linear(64, 10), 64) == "10x64 is not a multiple of 16"
    assert reason_unsupported(nn.Conv2d(64, 64, 1), 63) == "63 rows are not a multiple of 8"
    assert reason_unsupported(nn.Conv2d(64, 32, 1, 2), 64) is None
    assert "a GPU" in missing(torch.device("cpu"))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.expand, self.norm, self.reduce = nn.Conv2d(16, 32, 1), nn.BatchNorm2d(32), nn.Conv2d(32, 16, 1)
        self.fc = nn.Linear(16, 16)

    def forward(self, x):
        return self.fc(self.reduce(self.norm(self.expand(x)).relu()).mean((2, 3)))


RUN = {"expand": Run24.FORWARD, "reduce": Run24.TRANSPOSED, "fc": Run24.TRANSPOSED}


def train(net, acdc, optimizer, steps, dtype=torch.float32):
    losses = []
    for step in range(acdc.step, acdc.step + steps):
        acdc.before_step()
        random = torch.Generator().manual_seed(step)
        images = torch.randn(8, 16, 4, 4, generator=random).to(dtype)
        labels = torch.randint(0, 16, (8,), generator=random)
        loss = functional.cross_entropy(net.train()(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        with torch.no_grad():
            net.eval()(images)
    return losses


def make(net, phases, run24):
    optimizer = torch.optim.SGD(net.parameters(), 0.1, 0.9)
    acdc = ACDC(net, Transposable24(), PhaseSchedule.parse(phases), steps_per_epoch=3)
    acdc.attach(optimizer)
    acdc.accelerate(run24)
    return acdc, optimizer


def test_switching_costs_one_graph_in_all():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    net = Net()
    acdc, optimizer = make(net, "(dense 1, sparse 1) x4", RUN)
    net.compile(backend="aot_eager")
    graphs = []
    for _ in range(8):
        train(net, acdc, optimizer, 3)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs == [2] + [3] * 7


def test_training_is_the_masked_dense_training():
    """Phases with 2:4 kernels on and off, in float64: the same losses, masks and weights, no leak."""
    phases = "dense 1, (sparse 1, dense 1) x2, sparse 1"
    first, second = Net().double(), Net().double()
    dense, dense_optimizer = make(first, phases, {})
    sparse, sparse_optimizer = make(second, phases, RUN)
    for epoch in range(6):
        a = train(first, dense, dense_optimizer, 3, torch.float64)
        b = train(second, sparse, sparse_optimizer, 3, torch.float64)
        assert a == pytest.approx(b, rel=1e-9)
        on = {name for name, layer in sparse.layers.items() if layer.kernel is not Run24.NOT}
        assert on == (set(RUN) if epoch % 2 else set())
    for name, mask in dense.masks().items():
        assert torch.equal(mask, sparse.masks()[name])
        assert (sparse.weights()[name][~mask] == 0).all()


def test_a_resumed_run_keeps_its_kernels():
    net = Net()
    acdc, optimizer = make(net, "dense 1, sparse 2", RUN)
    train(net, acdc, optimizer, 5)
    state, model = acdc.state_dict(), copy.deepcopy(net.state_dict())
    resumed = Net()
    other, _ = make(resumed, "dense 1, sparse 2", {})
    resumed.load_state_dict(model)
    other.load_state_dict(state)
    assert {name: layer.kernel for name, layer in other.layers.items()} == RUN
    with pytest.raises(KeyError, match="not a masked layer: nowhere"):
        other.accelerate({"nowhere": Run24.FORWARD})


def test_a_state_of_an_earlier_version_names_its_kernels_run24():
    acdc, _ = make(Net(), "dense 1, sparse 1", RUN)
    state = acdc.state_dict()
    state["run24"] = state.pop("kernels")
    assert set(state["run24"].values()) == {"2:4 forward", "2:4 forward and input gradient"}
    other, _ = make(Net(), "dense 1, sparse 1", {})
    other.load_state_dict(state)
    assert other.kernels == RUN


def test_a_kernel_of_a_later_version_is_refused_by_name():
    acdc, _ = make(Net(), "dense 1, sparse 1", RUN)
    state = {**acdc.state_dict(), "kernels": {"fc": "3:7 forward"}}
    with pytest.raises(ValueError, match="kernels that this version does not have: 3:7 forward"):
        acdc.load_state_dict(state)
    assert acdc.kernels == RUN


def test_export_forgets_how_layers_ran():
    net = Net()
    acdc, optimizer = make(net, "dense 1, sparse 1", RUN)
    train(net, acdc, optimizer, 4)
    plain = acdc.export()
    assert not any(hasattr(layer, "kernel") for layer in plain.modules())
    assert not any(isinstance(layer, MaskedConv2d | MaskedLinear) for layer in plain.modules())


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [(GlobalMagnitude(0.3), {}), (NM(2, 4), dict.fromkeys(RUN, Run24.FORWARD)), (Transposable24(), RUN)],
)
def test_masks_of_another_pattern_run_no_kernel_that_misreads_them(pattern, expected, caplog):
    """As where a run goes on, within a sparse phase, with another pattern than it began with."""
    net = Net()
    acdc, optimizer = make(net, "sparse 2", {})
    acdc.pattern = pattern
    acdc.actions[0] = pattern
    train(net, acdc, optimizer, 4)
    acdc.accelerate(RUN)
    running = {name: layer.kernel for name, layer in acdc.layers.items() if layer.kernel is not Run24.NOT}
    assert running == expected
    assert ("its mask does not fit" in caplog.text) == (not expected)
