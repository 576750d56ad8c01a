import json

import numpy as np
import pytest
from torch import nn

from sparsity import count_flops
from trainer.models import get_model


def test_resnet20_dense_equals_the_papers_count(golden):
    recorded = json.loads((golden / "flops.json").read_text())["resnet20_dense"]
    flops = count_flops(get_model("resnet20", num_classes=10), (3, 32, 32))
    assert flops.forward() == recorded["total_flops_exact"]
    assert (flops.norm, flops.relu, flops.pooling) == tuple(
        recorded[key] for key in ("bn_flops", "relu_flops", "pooling_flops")
    )
    assert {layer.name: layer.flops() for layer in flops.layers} == {
        layer["name"]: layer["flops_exact"] for layer in recorded["layers"]
    }


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
