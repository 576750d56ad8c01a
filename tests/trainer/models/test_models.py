"""The paper's networks: names, shapes, counts and logits as its implementation has them."""

import json

import numpy as np
import pytest
import torch

from sparsity import count_flops
from trainer.models import MODELS, get_model

# our name -> (name in the recorded data, classes)
RECORDED = {
    "resnet50": ("resnet50", 1000),
    "mobilenetv1": ("mobilenet", 1000),
    "wide_resnet28_10": ("wideresnet", 100),
    "resnet20": ("resnet20", 10),
}


def reference(golden, name):
    return json.loads((golden / "models.json").read_text())[RECORDED[name][0]]


@pytest.mark.parametrize("name", RECORDED)
def test_names_shapes_and_counts(name, golden):
    recorded = reference(golden, name)
    with torch.device("meta"):
        model = get_model(name, RECORDED[name][1])
    assert [[n, list(p.shape)] for n, p in model.named_parameters()] == recorded["parameters"]
    assert sorted(n for n, _ in model.named_buffers()) == sorted(buffer[0] for buffer in recorded["buffers"])
    assert sum(p.numel() for p in model.parameters()) == recorded["num_parameters"]


@pytest.mark.parametrize("name", RECORDED)
def test_flops(name, golden):
    """Per layer, per kind of what is no layer, and in all. The record counts nonzero weights: a few of the
    random ones it used were exactly 0."""
    recorded = json.loads((golden / "flops.json").read_text())[f"{RECORDED[name][0]}_dense"]
    with torch.device("meta"):
        model = get_model(name, RECORDED[name][1])
    flops = count_flops(model, reference(golden, name)["input_shape"][1:])
    density = {layer["name"]: layer["weight_nonzero"] / layer["weight_numel"] for layer in recorded["layers"]}
    ours = {layer.name: layer.flops(density[layer.name]) for layer in flops.layers}
    assert ours == pytest.approx(
        {layer["name"]: layer["flops_exact"] for layer in recorded["layers"]}, rel=1e-12
    )
    assert (flops.norm, flops.relu, flops.pooling) == tuple(
        recorded[key] for key in ("bn_flops", "relu_flops", "pooling_flops")
    )
    assert flops.forward(density) == pytest.approx(recorded["total_flops_exact"], rel=1e-12)


@pytest.mark.parametrize("kind", ["unif90", "unif95", "nm24"])
def test_flops_of_sparse_resnet50(kind, golden):
    """The ratios that the paper's README states: 0.130 and 0.082 for uniform 90 and 95 %, 0.502 for 2:4."""
    key, ratio = {
        "unif90": ("resnet50_uniform90", 0.130),
        "unif95": ("resnet50_uniform95", 0.082),
        "nm24": ("resnet50_nm24", 0.502),
    }[kind]
    recorded = json.loads((golden / "flops.json").read_text())[key]
    with torch.device("meta"):
        flops = count_flops(get_model("resnet50", 1000), (3, 224, 224))
    density = {layer["name"]: layer["weight_nonzero"] / layer["weight_numel"] for layer in recorded["layers"]}
    assert flops.forward(density) == pytest.approx(recorded["total_flops_exact"], rel=1e-12)
    assert flops.forward(density) / flops.forward() == pytest.approx(ratio, abs=5e-4)


def hashed(numel: int, index: int) -> np.ndarray:
    """u(k, i) in [0, 1) of the recorded fill: tests/golden/README.md."""
    h = np.arange(numel, dtype=np.uint32) + np.uint32((0x9E3779B9 * (index + 1)) & 0xFFFFFFFF)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, None)):
        h = h ^ (h >> np.uint32(shift))
        if factor is not None:
            h = h * np.uint32(factor)
    return h / 2.0**32


def fill(model: torch.nn.Module) -> None:
    """The recorded fill of the parameters; running statistics are 0 and 1 already."""
    for i, (name, parameter) in enumerate(model.named_parameters()):
        k = np.arange(parameter.numel(), dtype=np.float64)
        if parameter.dim() > 1:
            fan_in = parameter.numel() / parameter.shape[0]
            values = np.sqrt(6 / fan_in) * (2 * hashed(parameter.numel(), i) - 1)
        elif name.endswith("weight"):
            values = 1 + 0.1 * np.sin(0.37 * k + i)
        else:
            values = 0.1 * np.cos(0.37 * k + i)
        parameter.detach().copy_(torch.from_numpy(values.astype(np.float32)).view(parameter.shape))


@pytest.mark.parametrize("name", ["resnet20", "resnet50"])
def test_logits_for_the_recorded_fill(name, golden):
    recorded = reference(golden, name)
    model = get_model(name, RECORDED[name][1]).eval()
    fill(model)
    for parameter, values in recorded["fill_check"].items():
        assert model.get_parameter(parameter).flatten()[:4].tolist() == values
    images = np.sin(0.37 * np.arange(np.prod(recorded["input_shape"]))).astype(np.float32)
    with torch.no_grad():
        logits = model(torch.from_numpy(images).view(recorded["input_shape"]))
    expected = recorded["float32"]
    assert logits.argmax(1).tolist() == expected["argmax"]
    assert logits.norm(dim=1).tolist() == pytest.approx(expected["logits_l2"], rel=1e-4)
    assert logits.sum(dim=1).tolist() == pytest.approx(expected["logits_sum"], rel=1e-3)
    first = torch.tensor(expected["logits_first16"])
    assert (logits[:, :16] - first).norm() <= 1e-4 * first.norm()


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101"])
def test_resnets_load_torchvisions_weights(name):
    from data.torchvision_import import import_torchvision

    with torch.device("meta"):
        theirs = import_torchvision().models.get_model(name, num_classes=1000)
        ours = get_model(name, 1000)
    shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]


def test_initialisation_is_the_papers():
    model = get_model("resnet50", 1000)
    assert all((m.weight == 1).all() for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d))
    weight = model.layer2[0].conv2.weight
    assert weight.std().item() == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.02)


def test_every_model_computes():
    arguments = {"resnet_cifar": {"depth": 8}}
    for name in MODELS:
        with torch.device("meta"):
            model = get_model(name, 7, **arguments.get(name, {}))
            size = 224 if name in ("resnet18", "resnet34", "resnet50", "resnet101", "mobilenetv1") else 32
            assert model(torch.empty(2, 3, size, size)).shape == (2, 7)


def test_a_strided_stem_makes_maps_a_quarter_as_large():
    images = torch.zeros(1, 3, 32, 32)
    stems = [get_model("resnet_cifar", 7, depth=8, stem_stride=stride).conv1 for stride in (1, 2, 4)]
    assert [stem(images).shape for stem in stems] == [(1, 16, 32, 32), (1, 16, 16, 16), (1, 16, 8, 8)]
    assert [stem.kernel_size for stem in stems] == [(3, 3), (3, 3), (7, 7)]


def test_a_strided_stem_sees_every_pixel():
    images = torch.zeros(1, 3, 32, 32, requires_grad=True)
    get_model("resnet_cifar", 7, depth=8, stem_stride=4).conv1(images).sum().backward()
    assert images.grad.ne(0).all()


def test_width_multipliers():
    counts = []
    for width in (0.25, 0.5, 0.75, 1.0):
        with torch.device("meta"):
            counts.append(sum(p.numel() for p in get_model("mobilenetv1", 1000, width=width).parameters()))
    assert counts == sorted(counts)
    assert counts[-1] == 4_231_976
    assert counts[0] == 470_072  # MobileNetV1-0.25: 0.47 M parameters (Howard et al. 2017, table 7: 0.5 M)


def test_wide_resnet_is_the_papers_variant():
    model = get_model("wide_resnet28_10", 100)
    block = model.layer2[0]
    assert (block.conv1.stride, block.conv2.stride) == ((1, 1), (2, 2))
    assert block.dropout.p == 0.3
    assert model.bn1.momentum == 0.9
    assert block.bn1.momentum == 0.1


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("resnet51", {}, "unknown model 'resnet51'; did you mean 'resnet5"),
        ("resnet20", {"heigth": 3}, "unexpected keyword argument 'heigth'"),
        ("mobilenetv1", {"width": 0.3}, "32 channels times it is not a whole number"),
        ("wide_resnet28_10", {"depth": 27}, "WideResNets have 6 n \\+ 4 layers"),
        ("resnet_cifar", {"depth": 8, "width": 0}, "width 0"),
        ("resnet_cifar", {"depth": 8, "stem_stride": 0}, "stem_stride 0"),
        ("torchvision:resnet19", {}, "torchvision has no classification model 'resnet19'; did you mean"),
        ("torchvision:resnet18", {"in_channels": 1}, "take 3 input channels, the data has 1"),
    ],
)
def test_mistakes_are_named(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        get_model(name, 10, **arguments)


def test_models_of_other_libraries():
    assert get_model("torchvision:mobilenet_v3_small", 7)(torch.randn(2, 3, 64, 64)).shape == (2, 7)


def test_timm_is_optional():
    try:
        import timm  # noqa: F401
    except ModuleNotFoundError:
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'acdc-train\[timm\]'"):
            get_model("timm:resnet18", 10)
    else:
        assert get_model("timm:resnet18", 7, in_channels=1)(torch.randn(2, 1, 64, 64)).shape == (2, 7)
