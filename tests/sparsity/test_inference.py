"""Finished sparse models: their file without zeros, and the model on sparse kernels."""

import copy
import io
import operator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from sparsity.inference import accelerated, load, model, read, save
from sparsity.inference.chain import Chain
from sparsity.inference.file import pack_bits, unpack_bits
from sparsity.kernels.choose import LayerChoice
from sparsity.kernels.unstructured import frozen
from sparsity.kernels.unstructured.family import GRIDS, SparseFamily
from sparsity.kernels.unstructured.kernel import DENSE_INNERMOST, from_name
from sparsity.kernels.unstructured.library import BuildError, find_compiler, vector_bytes
from sparsity.kernels.unstructured.operator import is_innermost

needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")


class Net(nn.Module):
    """Convolutions with BatchNorm behind them, a shortcut, groups, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16)
        self.conv, self.norm2 = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        x = self.norm2(self.conv(x)).relu() + x
        return self.fc(self.depthwise(x).mean((2, 3)))


@pytest.fixture
def net():
    torch.manual_seed(0)
    built = Net().eval()
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if parameter.dim() > 1 and name != "fc.weight":
                parameter.mul_(torch.rand_like(parameter) < 0.2)
        for norm in (built.norm, built.norm2):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            norm.weight.uniform_(0.5, 2)
    return built


@pytest.fixture
def forced(monkeypatch):
    """Kernels wherever they are right, faster or not."""
    chosen = SparseFamily.choose
    monkeypatch.setattr(
        SparseFamily, "choose", staticmethod(lambda measured, required=False: chosen(measured, True))
    )
    monkeypatch.setattr("sparsity.kernels.choose.best_region", lambda choices, *_: choices)


def test_bits_are_packed_and_unpacked():
    for count in (0, 1, 7, 8, 9, 1000):
        mask = torch.rand(count, generator=torch.Generator().manual_seed(count)) < 0.5
        packed = pack_bits(mask)
        assert packed.numel() == -(-count // 8)
        assert torch.equal(unpack_bits(packed, (count,)), mask)
    assert pack_bits(torch.tensor([True] + [False] * 7)).item() == 128


def test_a_file_holds_the_model_bit_for_bit_in_fewer_bytes(net, tmp_path):
    path = tmp_path / "net.safetensors"
    save(net, path, {"name": "net"})
    state, expected = read(path), net.state_dict()
    assert state.keys() == expected.keys()
    assert all(
        torch.equal(state[name], value) and state[name].dtype == value.dtype
        for name, value in expected.items()
    )
    dense = sum(value.nbytes for name, value in expected.items() if name in ("stem.weight", "conv.weight"))
    whole = sum(value.nbytes for value in expected.values())
    assert path.stat().st_size < whole - 0.7 * dense + 3000  # of which the header takes some


def test_other_files_are_refused(tmp_path):
    from safetensors.torch import save_file

    (tmp_path / "text").write_text("no tensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "plain")
    save_file({"a.values": torch.zeros(1)}, tmp_path / "half", {"sparse": '{"a": [4]}'})
    for name in ("text", "plain", "half", "nowhere"):
        with pytest.raises(
            (ValueError, FileNotFoundError), match=r"not a file of acdc export --format sparse|nowhere"
        ):
            read(tmp_path / name)


@needs_compiler
@pytest.mark.parametrize("images", [1, 16, 33])
def test_logits_are_those_of_the_dense_model(net, forced, tmp_path, images):
    save(net, tmp_path / "file")
    batch = torch.randn(images, 3, 12, 12)
    with torch.no_grad():
        expected = net(batch)
        fast = load(tmp_path / "file", Net(), batch)
        assert sum(type(layer).__name__.startswith("Sparse") for layer in fast.modules()) == 4
        assert not any(isinstance(layer, nn.BatchNorm2d) for layer in fast.modules())
        assert torch.allclose(fast(batch), expected, rtol=1e-4, atol=1e-4)
        other = torch.randn(images + 3, 3, 20, 16)  # another size than was measured
        assert torch.allclose(fast(other), net(other), rtol=1e-4, atol=1e-4)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = accelerated(net, batch)(batch)
        assert rounded.dtype == torch.bfloat16
        assert torch.allclose(rounded.float(), expected, rtol=0.1, atol=0.1)


@needs_compiler
@pytest.mark.rare
def test_compiled_logits_are_the_same(net, forced):
    batch = torch.randn(16, 3, 12, 12)
    fast = accelerated(net, batch)
    compiled = torch.compile(fast, dynamic=False)
    with torch.no_grad():
        assert torch.allclose(compiled(batch), net(batch), rtol=1e-4, atol=1e-4)


@needs_compiler
def test_a_dense_convolution_keeps_the_format_where_its_maps_meet_sparse_ones(net, monkeypatch):
    def conv_alone(family, layers, *rest):
        kernel = from_name("sparse fp32 " + " ".join([f"1x{run}x1/40000"] * 3))
        return [LayerChoice(name, kernel if name == "conv" else None) for name in layers]

    run = GRIDS[vector_bytes()][0][1]
    monkeypatch.setattr(model, "choose_kernels", conv_alone)
    batch = torch.randn(16, 3, 12, 12)
    fast = accelerated(net, batch)
    assert fast.stem.kernel is DENSE_INNERMOST  # its maps are added to those of conv
    assert type(fast.depthwise) is nn.Conv2d
    with torch.no_grad():
        assert is_innermost(fast.stem(batch))
        assert torch.allclose(fast(batch), net(batch), rtol=1e-4, atol=1e-4)


class Shortcut(nn.Module):
    """What stands behind its convolutions can be computed within, or looks as if it could."""

    def __init__(self, how):
        super().__init__()
        self.how, self.relu = how, nn.ReLU(inplace=True)
        self.first, self.second = nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.around = nn.Conv2d(8, 16, 1)

    def forward(self, x):
        if self.how == "residual":  # around is computed after second
            y = self.second(self.relu(self.first(x)))
            y += self.around(x)
            return self.relu(y)
        y = self.first(x)
        if self.how == "input changed in place":
            z = self.second(y)
            return (z + y.add_(1)).relu()
        if self.how == "summand changed in place":
            z = y * 2
            z += self.second(y)
            return z.relu() + z
        if self.how == "another shape":
            return torch.relu(self.second(y) + y.mean((2, 3), keepdim=True))
        return self.relu(y) if self.how == "relu" else self.second(y) + 1


@needs_compiler
@pytest.mark.parametrize("images", [1, 16])
@pytest.mark.parametrize(
    ("how", "nodes"),
    [
        ("residual", ["first", "around", "second"]),
        ("relu", ["first"]),
        ("input changed in place", None),
        ("summand changed in place", None),
        ("another shape", None),
        ("a number", None),
    ],
)
def test_what_stands_behind_a_layer_is_computed_within(forced, how, nodes, images):
    torch.manual_seed(0)
    net, batch = Shortcut(how).eval(), torch.randn(images, 8, 9, 7)
    fast = accelerated(net, batch)
    with torch.no_grad():
        assert torch.allclose(fast(batch), net(batch), rtol=1e-4, atol=1e-4)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = accelerated(net, batch)(batch)
        assert torch.allclose(rounded.float(), net(batch), rtol=0.1, atol=0.1)
    if nodes is not None:
        assert list(_called(fast)) == nodes


class Deep(nn.Module):
    """Layers in one chain, two of whose values are used behind it; one stays in use for long."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(6))
        self.down = nn.Conv2d(8, 4, 1, bias=False)

    def forward(self, x):
        first = torch.relu(self.layers[0](x))
        y = first
        for layer in self.layers[1:5]:
            y = torch.relu(layer(y))
        y, narrow = torch.relu(self.layers[5](y) + first), self.down(first)
        return y.mean((2, 3)).sum(1) + narrow.mean((1, 2, 3))


def _called(fast):
    """Names of layers and functions in the order in which they are called, those in chains, too."""
    names = {module: name for name, module in fast.named_modules()}
    for node in fast.graph.nodes:
        module = fast.get_submodule(node.target) if node.op == "call_module" else None
        if isinstance(module, Chain):
            yield from (names[step.layer] for step in module.steps)
        elif node.op.startswith("call") and node.target is not operator.getitem:
            yield node.target


@needs_compiler
@pytest.mark.parametrize("images", [0, 1, 16])
def test_a_chain_computes_what_its_layers_do_one_by_one(forced, images):
    torch.manual_seed(0)
    fast, batch = accelerated(Deep().eval(), torch.randn(1, 8, 9, 7)), torch.randn(images, 8, 9, 7)
    (chain,) = (module for module in fast.modules() if isinstance(module, Chain))
    assert len(chain.steps) == 7
    assert len(chain.outputs) == 2
    with torch.no_grad():
        for size in (batch, batch[:, :, :5], batch):  # a smaller one uses the memory of the larger one
            expected = [each.clone() for each in chain._one_by_one([size])]
            if chain._memory is not None:
                chain._memory.fill_(255)  # NaN, where something is read that was not written
            assert all(map(torch.equal, chain(size), expected))
        assert chain._memory is not None


@needs_compiler
def test_threads_share_a_chain(forced):
    torch.manual_seed(0)
    fast = accelerated(Deep().eval(), torch.randn(1, 8, 9, 7))
    batches = [torch.randn(1, 8, 9 + number % 12, 7) for number in range(48)]

    def answers(batch):
        with torch.no_grad():
            return [fast(batch) for _ in range(20)]

    expected = [answers(batch)[0] for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        for found, right in zip(pool.map(answers, batches), expected, strict=True):
            assert all(torch.equal(each, right) for each in found)


@needs_compiler
def test_a_chain_says_that_it_has_no_gradients(forced):
    fast = accelerated(Deep().eval(), torch.randn(1, 8, 9, 7))
    output = fast(torch.randn(1, 8, 9, 7, requires_grad=True))
    with pytest.raises(RuntimeError, match="a model for inference has no gradients"):
        output.sum().backward()


def _saved(fast):
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@needs_compiler
@pytest.mark.parametrize("copied", [copy.deepcopy, _saved])
@pytest.mark.parametrize("images", [2, 16])
def test_copies_and_saved_models_keep_their_kernels(net, forced, copied, images):
    batch = torch.randn(images, 3, 12, 12)
    fast = accelerated(net, batch)
    other = copied(fast)
    sparse = [layer for layer in other.modules() if type(layer).__name__.startswith("Sparse")]
    assert len(sparse) == 4
    assert all(layer.kernel.plan is not None for layer in sparse)
    with torch.no_grad():
        expected = fast(batch)
        del fast  # a copy lives on by itself
        assert torch.equal(other(batch), expected)


@needs_compiler
def test_a_saved_model_runs_dense_where_its_kernels_are_not(net, forced, monkeypatch, caplog):
    def fail(*arguments):
        raise BuildError("no C++ compiler")

    batch = torch.randn(2, 3, 12, 12)
    fast = accelerated(net, batch)
    monkeypatch.setattr(frozen, "FrozenPlan", fail)
    with torch.no_grad():
        assert torch.allclose(_saved(fast)(batch), net(batch), rtol=1e-4, atol=1e-4)
    assert "a sparse layer runs dense: no C++ compiler" in caplog.text


def test_a_model_that_fx_cannot_follow_keeps_its_batch_norm(net, monkeypatch, caplog):
    class Branching(Net):
        def forward(self, x):
            return super().forward(x if x.sum() > 0 else x + 1)

    branching = Branching().eval()
    branching.load_state_dict(net.state_dict())
    batch = torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        assert torch.allclose(accelerated(branching, batch)(batch), branching(batch), rtol=1e-4, atol=1e-4)
    assert "BatchNorm is not folded" in caplog.text


def test_without_a_build_the_model_runs_dense(net, monkeypatch, caplog):
    def fail(*arguments, **options):
        raise BuildError("no C++ compiler")

    monkeypatch.setattr(model, "choose_kernels", fail)
    batch = torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        assert torch.allclose(accelerated(net, batch)(batch), net(batch), rtol=1e-4, atol=1e-4)
    assert "the model runs dense" in caplog.text


def test_the_model_given_is_left_as_it_is(net):
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with torch.no_grad():
        accelerated(net, torch.randn(2, 3, 12, 12))
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert type(net.stem) is nn.Conv2d
