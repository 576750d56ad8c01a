"""Finished sparse models: their file without zeros, and the model on sparse kernels."""

import copy
import io

import pytest
import torch
from torch import nn

from sparsity.inference import accelerated, load, model, read, save
from sparsity.inference.file import pack_bits, unpack_bits
from sparsity.kernels.choose import LayerChoice
from sparsity.kernels.unstructured import frozen
from sparsity.kernels.unstructured.family import GRIDS
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


def _saved(fast):
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


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


def test_a_saved_model_runs_dense_where_its_kernels_are_not(net, forced, monkeypatch, caplog):
    def fail(*arguments):
        raise BuildError("no C++ compiler")

    batch = torch.randn(2, 3, 12, 12)
    fast = accelerated(net, batch)
    monkeypatch.setattr(frozen, "FrozenPlan", fail)
    with torch.no_grad():
        assert torch.allclose(_saved(fast)(batch), net(batch), rtol=1e-4, atol=1e-4)
    assert "a sparse layer runs dense: no C++ compiler" in caplog.text


def test_a_model_that_fx_cannot_follow_keeps_its_batch_norm(net, caplog):
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
