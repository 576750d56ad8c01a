import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

from data.torchvision_import import import_torchvision
from sparsity import count_flops
from sparsity.flops import ModelFlops
from sparsity.layers import mask_layers
from tests.slow import slow
from trainer.models import get_model


def test_resnet20_sparse_equals_the_papers_count(golden):
    recorded = json.loads((golden / "flops.json").read_text())["resnet20_trajectory_global90_final"]
    flops = count_flops(get_model("resnet20", num_classes=10), (3, 32, 32))
    density = {layer["name"]: layer["weight_nonzero"] / layer["weight_numel"] for layer in recorded["layers"]}
    assert flops.forward(density) == pytest.approx(recorded["total_flops_exact"], rel=1e-12)
    assert flops.training(density) == 3 * flops.forward(density)


def test_counting_leaves_the_model_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    flops = count_flops(model, (3, 8, 8))
    assert flops.forward() == 2 * 108 * 16 + 4 * 16 + 4 * 16 + 4 * 16
    assert all(np.array_equal(state[name], value) for name, value in model.state_dict().items())
    assert not model[0]._forward_hooks


def test_layers_that_are_called_by_keyword_count():
    class Named(nn.Sequential):
        def forward(self, images):
            for layer in self:
                images = layer(input=images)
            return images

    layers = (nn.Conv2d(3, 4, 3, padding=1), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 5))
    assert count_flops(Named(*layers), (3, 8, 8)) == count_flops(nn.Sequential(*layers), (3, 8, 8))


def torchvisions(name: str) -> tuple[nn.Module, int, float]:
    """A model of torchvision without values, the side of its images, and the 10^9 multiply-adds stated for
    it."""
    models = import_torchvision().models
    weights = next(iter(models.get_model_weights(name)))
    with torch.device("cpu" if name.startswith("regnet") else "meta"):  # RegNets compute their widths
        return models.get_model(name), weights.transforms().crop_size[0], weights.meta["_ops"]


def products(flops: ModelFlops) -> int:
    return flops.products + sum(layer.products for layer in flops.layers)


@pytest.mark.parametrize(
    "name",
    [
        "vit_b_16",  # 17.56, of which 11.28 are in calls of layers, where they are not masked
        "swin_t",  # 4.49; 2.97
        "convnext_tiny",
        "resnet50",
        pytest.param("maxvit_t", marks=pytest.mark.rare),
        *slow("swin_v2_t", "efficientnet_b0", "mobilenet_v3_large", "regnet_y_400mf"),
    ],
)
def test_products_are_as_many_as_torchvision_states(name):
    model, side, billions = torchvisions(name)
    assert products(count_flops(model, (3, side, side))) / 2e9 == pytest.approx(billions, rel=5e-3)


def test_attention_is_dense_and_what_multiplies_a_layers_weight_is_the_layers():
    """ViT-B/16: 12 blocks, 197 tokens, width 768. MultiheadAttention never calls its projections."""
    model, side, _ = torchvisions("vit_b_16")
    flops = count_flops(model, (3, side, side))
    tokens, width = 197, 768
    assert flops.products == 12 * 2 * 2 * tokens * tokens * width
    layers = {layer.name: layer for layer in flops.layers}
    for name, outputs in (("in_proj_weight", 3 * width), ("out_proj", width)):
        projection = layers[f"encoder.layers.encoder_layer_3.self_attention.{name}"]
        assert (projection.products, projection.calls) == (2 * tokens * width * outputs, ())
        assert projection.bias == tokens * outputs
    assert layers["encoder.layers.encoder_layer_3.mlp.0"].calls == ((tokens, 1, tokens),)
    assert layers["conv_proj"].products == 2 * 14 * 14 * 16 * 16 * 3 * width

    assert flops.forward() == products(flops) + sum(layer.bias for layer in flops.layers)
    half = dict.fromkeys(layers, 0.5)
    assert flops.forward() - flops.forward(half) == sum(layer.products for layer in flops.layers) / 2


@pytest.mark.parametrize("name", ["resnet20", "torchvision:swin_t"])
def test_masks_cost_nothing(name):
    """Swin passes the weights of its attention to functions, past the layers' calls."""
    with torch.device("meta"):
        model = get_model(name, 10)
        plain = count_flops(model, (3, 32, 32))
        masked = mask_layers(model)
    assert count_flops(model, (3, 32, 32)) == plain
    assert {layer.name for layer in plain.layers} == set(masked)


class Shared(nn.Module):
    """A head that runs twice, at 16 and at 4 positions."""

    def __init__(self):
        super().__init__()
        self.pool, self.head = nn.MaxPool2d(2), nn.Conv2d(3, 5, 1)

    def forward(self, x):
        return self.head(x).mean() + self.head(self.pool(x)).mean()


def test_a_layer_that_runs_twice_counts_twice():
    flops = count_flops(Shared(), (3, 4, 4))
    (head,) = flops.layers
    assert (head.name, head.calls) == ("head", ((16, 4, 4), (4, 2, 2)))
    assert (head.products, head.bias) == (2 * 15 * 20, 5 * 20)
    assert flops.forward({"head": 0.2}) == 2 * 3 * 20 + 5 * 20 + 4 * 12


class Functional(nn.Module):
    """Products that no module runs: with a layer's weight, a part of one, and without any."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 8, 3), nn.Linear(8, 6)
        self.query = nn.Parameter(torch.zeros(2, 3))

    def forward(self, x):
        tokens = functional.conv2d(x, self.conv.weight, padding=1).flatten(2).transpose(1, 2)  # (1, 16, 8)
        keys = functional.linear(tokens, self.linear.weight[:3])
        scores = torch.einsum("qc,btc->bqt", self.query, keys)
        return scores @ self.linear(tokens)


def test_products_of_functions():
    flops = count_flops(Functional(), (3, 4, 4))
    conv, linear = flops.layers
    assert (conv.name, conv.products, conv.calls) == ("conv", 2 * 8 * 27 * 16, ())
    assert (linear.name, linear.products, linear.calls) == (
        "linear",
        2 * 24 * 16 + 2 * 48 * 16,
        ((16, 1, 16),),
    )
    assert flops.products == 2 * 2 * 3 * 16 + 2 * 2 * 16 * 6


def test_in_inference_mode_operators_come_whole():
    """Linear instead of a matrix product."""
    model = Functional()
    with torch.inference_mode():
        counted = count_flops(model, (3, 4, 4))
    assert counted == count_flops(model, (3, 4, 4))


def test_layers_whose_weight_is_another_ones_or_computed():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 12), nn.Linear(12, 12), weight_norm(nn.Linear(12, 2)))
    model[2].weight = model[1].weight
    flops = count_flops(model, (3, 2, 2))
    assert [(layer.name, layer.products) for layer in flops.layers] == [("1", 288), ("2", 288), ("3", 48)]
    assert flops.products == 0


def test_a_shared_weight_that_a_function_uses_stays_shared():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.project = nn.Linear(4, 4, bias=False)
            self.again = self.project.weight

        def forward(self, x):
            return self.project(x) @ self.again

    (layer,) = count_flops(Tied(), (1, 1, 4)).layers
    assert (layer.products, layer.calls) == (2 * 2 * 16, ((1, 1, 1),))
