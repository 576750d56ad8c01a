"""What stands between layers on sparse CPU kernels: BatchNorm and pooling against torch's, and their
graphs."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from sparsity import ACDC, PhaseSchedule, UniformMagnitude, inductor
from sparsity.kernels.unstructured import fusion, library
from sparsity.kernels.unstructured.batch_norm import batch_norm, takes
from sparsity.kernels.unstructured.operator import is_innermost, to_innermost
from sparsity.kernels.unstructured.pooling import max_pool

pytestmark = pytest.mark.skipif(library.find_compiler() is None, reason="no C++ compiler")
FP32, BF16 = torch.float32, torch.bfloat16
TOLERANCES = {FP32: 1e-6, BF16: 2**-8}  # of the greatest value


def assert_close(found, expected, dtype=FP32):
    greatest = max(expected.abs().max().item(), 1e-3)
    assert (found.double() - expected).abs().max().item() <= TOLERANCES[dtype] * greatest


def maps(*size, dtype=FP32, offset=0.0):
    values = 3 * torch.randn(size) + offset * torch.randn(size[1], 1, 1)
    return to_innermost(values.to(dtype)).requires_grad_()


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("behind", ["nothing", "relu", "add and relu"])
@pytest.mark.parametrize(
    ("size", "offset"), [((32, 5, 7, 3), 0), ((64, 16, 1, 1), 1), ((32, 3, 40, 40), 100)]
)
def test_batch_norm_is_that_of_torch_in_double_precision(dtype, behind, size, offset):
    torch.manual_seed(0)
    x = maps(*size, dtype=dtype, offset=offset)
    other = maps(*size, dtype=dtype) if behind == "add and relu" else None
    weight, bias = (torch.rand(size[1]) + 0.5).requires_grad_(), torch.randn(size[1]).requires_grad_()
    y, statistics = batch_norm(x, other, weight, bias, 1e-5, behind != "nothing")
    gradient = maps(*size, dtype=dtype).detach()
    y.backward(gradient)
    leaves = [
        None if each is None else each.detach().double().requires_grad_() for each in (x, other, weight, bias)
    ]
    mean, variance = torch.zeros(size[1]).double(), torch.zeros(size[1]).double()
    expected = functional.batch_norm(leaves[0], mean, variance, *leaves[2:], True, 1.0, 1e-5)
    expected = expected if other is None else expected + leaves[1]
    expected = expected if behind == "nothing" else expected.relu()
    expected.backward(gradient.double())
    assert is_innermost(y)
    loose = 1 + offset**2 / 10  # a mean far from 0 costs digits, of x itself as well
    assert (y.double() - expected).abs().max() <= loose * TOLERANCES[dtype] * expected.abs().max()
    assert_close(statistics[0], mean)
    assert (statistics[2].double() / variance - 1).abs().max() < 1e-5
    if offset <= 1:
        assert_close(x.grad, leaves[0].grad, dtype)
        assert_close(weight.grad, leaves[2].grad)
        assert_close(bias.grad, leaves[3].grad)
    if other is not None:
        assert torch.equal(other.grad, gradient * (y > 0))


def test_batch_norm_does_not_depend_on_the_number_of_threads():
    x, weight, bias = maps(32, 7, 9, 9), torch.rand(7), torch.rand(7)
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        y, statistics = batch_norm(x, None, weight, bias, 1e-5, True)
        (gradient,) = torch.autograd.grad(y.square().sum(), x)
        found.append((y, statistics, gradient))
    torch.set_num_threads(before)
    assert all(torch.equal(*pair) for other in found[1:] for pair in zip(found[0], other, strict=True))


def test_what_is_not_a_number_stays_so():
    x = maps(32, 2, 2, 2).detach()
    x[3, 1, 0, 0] = torch.nan
    y, _ = batch_norm(x, None, torch.ones(2), torch.zeros(2), 1e-5, True)
    assert not y[:, 0].isnan().any()
    assert y[:, 1].isnan().all()
    pooled, _ = max_pool(x, (2, 2), (2, 2), (0, 0))
    assert pooled.isnan().sum() == 1
    assert pooled[3, 1].isnan()


def test_maps_that_do_not_fill_vectors_are_left_to_others():
    assert takes(maps(32, 3, 5, 5))
    assert not takes(maps(3, 3, 5, 5))  # 75 numbers a channel
    assert not takes(torch.randn(32, 3, 5, 5))
    assert not takes(maps(32, 3, 5, 5).double())


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize(
    "window",
    [((3, 3), (2, 2), (1, 1)), ((2, 2), (2, 2), (0, 0)), ((2, 3), (2, 1), (1, 0)), ((5, 5), (3, 3), (2, 2))],
)
def test_pooling_is_that_of_torch(dtype, window):
    torch.manual_seed(0)
    x = maps(64, 3, 11, 9, dtype=dtype)
    y, _ = max_pool(x, *window)
    other = x.detach().float().requires_grad_()
    expected = functional.max_pool2d(other, *window)
    gradient = maps(*y.shape, dtype=dtype).detach()
    y.backward(gradient)
    expected.backward(gradient.float())
    assert torch.equal(y.float(), expected)
    assert_close(x.grad, other.grad, dtype)


def test_the_operators_keep_torchs_rules():
    x, weight, bias = maps(32, 4, 6, 6), torch.rand(4, requires_grad=True), torch.rand(4, requires_grad=True)
    for other, relu in ((None, False), (None, True), (maps(32, 4, 6, 6), True)):
        results = torch.library.opcheck(torch.ops.acdc.batch_norm, (x, other, weight, bias, 1e-5, relu))
        assert set(results.values()) == {"SUCCESS"}
    results = torch.library.opcheck(torch.ops.acdc.max_pool, (x, (3, 3), (2, 2), (1, 1)))
    assert set(results.values()) == {"SUCCESS"}


class Block(nn.Module):
    """relu(norm(convolution) + shortcut), whose shortcut may be a convolution and a norm as well."""

    def __init__(self, width, out, stride, inplace):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 1, bias=False), nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace)
        self.shortcut = nn.Identity()
        if stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x):
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += self.shortcut(x)
        return self.relu(y)


def network(inplace=True):
    """With a stem that is not masked."""
    torch.manual_seed(0)
    stem = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace), nn.MaxPool2d(3, 2, 1)]
    blocks = [Block(16, 16, 1, inplace), Block(16, 32, 2, inplace)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5)]
    return nn.Sequential(*stem, *blocks, *head).to(memory_format=torch.channels_last)


def train(net, backend, accelerate="require", images=32, autocast=False):
    """Losses of some steps."""
    acdc = ACDC(net, UniformMagnitude(0.7), PhaseSchedule.parse("sparse 9"), 1, exclude=["0", "8"])
    optimizer = torch.optim.SGD(net.parameters(), 0.05, 0.9)
    acdc.attach(optimizer)
    random = torch.Generator().manual_seed(1)
    batch = torch.randn(images, 3, 16, 16, generator=random).to(memory_format=torch.channels_last)
    labels = torch.arange(images) % 5
    with torch.autocast("cpu", BF16, enabled=autocast):
        acdc.accelerate(accelerate, batch)
    torch._dynamo.reset()
    compiled = torch.compile(lambda batch: net(batch), dynamic=False, backend=backend)
    losses = []
    for _ in range(4):
        acdc.before_step()
        with torch.autocast("cpu", BF16, enabled=autocast):
            loss = functional.cross_entropy(compiled(batch), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.fixture
def fused(monkeypatch):
    """Names of the operators of the graphs that fuse has changed, in their order."""
    seen, fuse = [], fusion.fuse

    def note(graph):
        count = fuse(graph)
        seen.extend(
            node.target.name() for node in graph.graph.nodes if isinstance(node.target, torch._ops.OpOverload)
        )
        return count

    monkeypatch.setattr(fusion, "fuse", note)
    return seen


def eager(graph, inputs):
    """A backend that runs the changed graph as it is."""
    fusion.fuse(graph)
    return graph.forward


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch.compile's own look
@pytest.mark.parametrize(("backend", "autocast", "inplace"), [
    (eager, False, True), (eager, False, False), (inductor, False, True),
    pytest.param(inductor, True, True, marks=pytest.mark.rare),
])  # fmt: skip
def test_a_run_with_all_kernels_is_the_run_without(fused, backend, autocast, inplace):
    net, other = network(inplace), network(inplace)
    losses = train(net, backend, autocast=autocast)
    expected = train(other, "eager", "off", autocast=autocast)
    assert losses == pytest.approx(expected, rel=3e-2 if autocast else 1e-4)
    for (name, found), (_, buffer) in zip(net.named_buffers(), other.named_buffers(), strict=True):
        if "running" in name or "tracked" in name:
            torch.testing.assert_close(
                found, buffer, rtol=3e-2 if autocast else 1e-4, atol=1e-2 if autocast else 1e-5
            )
    whole = [
        *("to_innermost", "batch_norm", "max_pool"),
        *("gather", "batch_norm", "gather", "batch_norm"),
        *("gather", "batch_norm", "gather", "gather", "batch_norm", "batch_norm"),
    ]
    names = [name.removeprefix("acdc::") for name in fused]
    if autocast:  # without instructions for bf16 the shortcut's convolution is faster dense
        shorter = [name for place, name in enumerate(whole) if place not in (10, 12)]
        assert names in (whole, shorter)
    else:
        assert names == whole


def test_other_graphs_stay_as_they_are(fused):
    net = network()
    assert train(net, eager, "off") == train(network(), "eager", "off")
    torch.compile(net.eval(), backend=eager)(torch.randn(32, 3, 16, 16))
    assert not fused


class Odd(nn.Module):
    """What kernels could be put between, if it were not for one thing."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.conv, self.bn = nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.next = nn.Conv2d(16, 16, 1)
        self.wide = nn.Parameter(torch.randn(32))
        if how == "weights in bfloat16":
            self.bn.bfloat16()

    def forward(self, x):
        first = self.conv(x)
        if self.how == "maps changed by a ReLU in place":
            maps = x * 2 - 1
            return self.next(functional.max_pool2d(functional.relu_(maps), 1)) + maps
        if self.how == "results changed in place":
            first += x
            return self.next(torch.relu_(functional.max_pool2d(torch.relu_(first), 2)))
        if self.how == "another memory format":
            return self.next(self.bn(torch.relu(x * 2).to(memory_format=torch.channels_last)))
        if self.how == "one BatchNorm twice":
            norm, relu = self.bn(first), torch.relu(self.bn(2 * self.next(first) + 3))
            return self.next(torch.relu(norm + relu))
        if self.how == "weights with gaps":
            weight, bias = self.wide[::2], self.wide[1::2]
            return self.next(functional.batch_norm(first, None, None, weight, bias, True, 0.1, 1e-5))
        if self.how == "names of operands":
            norm = self.bn(functional.relu(input=first))
            return self.next(functional.max_pool2d(input=norm, kernel_size=2))
        if self.how == "a window of one number":
            return self.next(functional.max_pool2d(first, (2,)))
        norm = self.bn(first)
        if self.how == "the norm itself, used again":
            return self.next(torch.relu(norm)) + norm
        if self.how == "the sum, used again":
            total = norm + first
            return self.next(torch.relu(total)) + total
        if self.how == "the norm added to itself":
            return self.next(torch.relu(norm + norm))
        if self.how == "a summand changed in place":
            first = first * 2
            first += norm
            return self.next(torch.relu(first)) + first
        assert self.how in ("few images", "weights in bfloat16")
        return self.next(functional.max_pool2d(torch.relu(norm), 2))


@pytest.mark.parametrize(
    ("how", "kernels"),
    [
        ("the norm itself, used again", ["batch_norm"]),
        ("the sum, used again", ["batch_norm"]),
        ("the norm added to itself", ["batch_norm"]),
        ("a summand changed in place", ["batch_norm"]),
        ("one BatchNorm twice", ["batch_norm", "batch_norm"]),
        ("few images", ["batch_norm"]),
        ("maps changed by a ReLU in place", ["max_pool"]),
        ("results changed in place", ["max_pool"]),
        ("another memory format", ["batch_norm"]),
        ("names of operands", ["batch_norm"]),
        ("a window of one number", ["max_pool"]),
        ("weights with gaps", []),
        ("weights in bfloat16", ["max_pool"]),
    ],
)
def test_what_is_not_as_kernels_need_it_stays_right(fused, how, kernels):
    def make():
        torch.manual_seed(0)
        rest = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), *[nn.Identity() for _ in range(3)], nn.Linear(16, 5)]
        return nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), Odd(how), *rest)

    net, other = make(), make()
    options = {"images": 4 if how == "few images" else 32, "autocast": how == "weights in bfloat16"}
    assert train(net, eager, **options) == pytest.approx(
        train(other, "eager", "off", **options), rel=3e-2 if options["autocast"] else 1e-4
    )
    for found, expected in zip(net.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(found, expected, rtol=3e-2, atol=1e-4)
    found = [name.removeprefix("acdc::") for name in fused]
    assert [name for name in found if name in ("batch_norm", "max_pool")] == kernels
