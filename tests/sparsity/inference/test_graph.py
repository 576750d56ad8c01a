"""What the graph of a finished model is changed to, and that it computes the same."""

import operator

import pytest
import torch
from torch import nn

from sparsity.inference import accelerated
from sparsity.inference.chain import Chain


def _called(fast):
    """Names of layers and functions in the order in which they are called, those in chains, too."""
    names = {module: name for name, module in fast.named_modules()}
    for node in fast.graph.nodes:
        module = fast.get_submodule(node.target) if node.op == "call_module" else None
        if isinstance(module, Chain):
            yield from (names[step.layer] for step in module.steps)
        elif node.op.startswith("call") and node.target is not operator.getitem:
            yield node.target


class Shortcut(nn.Module):
    """What stands behind its convolutions can be computed within, or looks as if it could."""

    def __init__(self, how):
        super().__init__()
        self.how, self.relu = how, nn.ReLU(inplace=True)
        self.first, self.second = nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.around, self.chain0 = nn.Conv2d(8, 16, 1), nn.Tanh()

    def forward(self, x):
        if self.how == "residual":  # around is computed after second
            y = self.second(self.relu(self.first(x)))
            y += self.around(x)
            return self.relu(y)
        if self.how == "a smaller map":
            return self.second(self.first(x.mean((2, 3), keepdim=True))) + self.around(x)
        y = self.first(x)
        if self.how == "input by name":
            return self.second(input=y).relu()
        if self.how == "a name that is taken":
            return self.chain0(self.second(y))
        if self.how == "a size":
            return self.second(y) + x.shape[0]
        if self.how == "input changed in place":
            z = self.second(y)
            return (z + y.add_(1)).relu()
        if self.how == "input changed before the ReLU":
            z = self.second(y)
            y.add_(1)
            return z.relu() + y
        if self.how == "summand changed in place":
            z = y * 2
            z += self.second(y)
            return z.relu() + z
        if self.how == "another shape":
            return torch.relu(self.second(y) + y.mean((2, 3), keepdim=True))
        return self.relu(y) if self.how == "relu" else self.second(y) + 1


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
        ("a smaller map", None),
        ("input by name", None),
        ("a name that is taken", None),
        ("a size", None),
        ("input changed before the ReLU", None),
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
