"""Neighbouring layers of a finished model, computed in one call."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from sparsity.inference import accelerated
from sparsity.inference.chain import Chain


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


def test_what_is_added_in_another_precision_is_not_rounded(forced):
    torch.manual_seed(0)
    net, batch = (
        nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)),
        torch.randn(2, 8, 9, 7),
    )

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return x + self.net(x)

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        fast = accelerated(Residual().eval(), batch)
        assert any(isinstance(module, Chain) for module in fast.modules())
        found, expected = fast(1000 + batch), Residual()(1000 + batch)
    assert found.dtype == torch.float32
    assert torch.allclose(
        found, expected, rtol=0, atol=20
    )  # of what the net adds; bf16 holds 1000 to within 4


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


def test_a_chain_says_that_it_has_no_gradients(forced):
    fast = accelerated(Deep().eval(), torch.randn(1, 8, 9, 7))
    output = fast(torch.randn(1, 8, 9, 7, requires_grad=True))
    with pytest.raises(RuntimeError, match="a model for inference has no gradients"):
        output.sum().backward()


COMPILE = """
import sys
import torch
from torch import nn
import sparsity.kernels.choose
from sparsity.inference import accelerated
from sparsity.kernels.unstructured.family import SparseFamily

chosen = SparseFamily.choose
SparseFamily.choose = staticmethod(lambda measured, required=False: chosen(measured, True))
sparsity.kernels.choose.best_region = lambda choices, *_: choices
net = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, int(sys.argv[1]), 3), nn.Tanh()).eval()
batch = torch.randn(2, 8, 9, 7)
fast = accelerated(net, batch)
assert "chain0" in dict(fast.named_modules())
with torch.no_grad():
    assert torch.allclose(torch.compile(fast)(batch), net(batch), rtol=1e-4, atol=1e-4)
"""


def test_chains_of_other_layers_have_another_digest(forced):
    """Compiled code that is kept is found by it: without, another model's would look the same."""
    digests = []
    for channels, stride in ((8, 1), (4, 1), (8, 2), (8, 1)):
        net = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, channels, 3, stride)).eval()
        digests.append(accelerated(net, torch.randn(1, 8, 9, 7)).chain0.digest)
    assert digests[0] == digests[3]
    assert len(set(digests)) == 3


@pytest.mark.rare
def test_compiled_code_that_is_kept_is_not_another_models(forced, tmp_path):
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    for channels in ("8", "4"):  # the second would find what the first one kept
        command = [sys.executable, "-c", COMPILE, channels]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
