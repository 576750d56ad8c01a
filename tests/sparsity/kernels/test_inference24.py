import copy

import pytest
import torch
from torch import nn

from sparsity import NM
from sparsity.kernels.semi_structured.inference import PackedConv24, PackedLinear24, pack_layers, packable


def make(bias=True):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(16, 32, 1, 2, bias=bias),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 48, bias),
        nn.Linear(48, 10),
    ).eval()
    for layer in (net[0], net[2], net[5]):
        layer.weight.data *= NM(2, 4)({"w": layer.weight})["w"]
    return net.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("bias", [False, True])
def test_packed_layers_answer_the_same(bias):
    net = make(bias)
    assert packable(net) == ["0", "5"]  # the second convolution is 3 x 3, the last layer is dense and odd
    packed = copy.deepcopy(net)
    pack_layers(packed, ["0", "5"], torch.float32)
    assert isinstance(packed[0], PackedConv24)
    assert isinstance(packed[5], PackedLinear24)
    images = torch.randn(4, 16, 8, 8).to(memory_format=torch.channels_last)
    with torch.no_grad():
        assert torch.allclose(packed(images), net(images), atol=1e-6)
        assert packed[0](images).is_contiguous(memory_format=torch.channels_last)
        compiled = torch.compile(packed, backend="aot_eager", fullgraph=True)
        assert torch.allclose(compiled(images), net(images), atol=1e-6)


def test_a_dense_layer_is_refused():
    net = make()
    with pytest.raises(ValueError, match="layer '6' is not a 2:4 layer"):
        pack_layers(net, ["6"], torch.float32)
    net[5].weight.data[0, 0:3] = 1.0
    assert packable(net) == ["0"]


def test_attention_keeps_its_projections():
    """Torch's function takes their weights, not the layers."""
    net = nn.MultiheadAttention(32, 2).eval()
    for weight in (net.in_proj_weight, net.out_proj.weight):
        weight.data *= NM(2, 4)({"w": weight})["w"]
    assert packable(net) == []
