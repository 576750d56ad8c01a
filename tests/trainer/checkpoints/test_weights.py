"""Weights of other people's training, out of the forms in which they are kept."""

import argparse

import numpy as np
import pytest
import torch

from trainer.checkpoints.saved_model import build_model
from trainer.checkpoints.weights import load_weights

TEN = {"name": "resnet20", "num_classes": 10, "arguments": {"in_channels": 3}}
THREE = {**TEN, "num_classes": 3}


@pytest.fixture
def trained():
    torch.manual_seed(1)
    return build_model(TEN)


def load(tmp_path, content, description=TEN, key=None):
    torch.save(content, tmp_path / "w.pth")
    torch.manual_seed(2)
    model = build_model(description)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    told = load_weights(model, tmp_path / "w.pth", key, description)
    return model.state_dict(), before, told


def assert_same(state, expected, but=()):
    for name, value in expected.items():
        if name not in but:
            assert torch.equal(state[name], value), name


class Lightning(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model, self.loss = model, torch.nn.CrossEntropyLoss(weight=torch.ones(10))


def compiled(model):
    """As torch.compile names the parameters, without compiling."""
    return {f"_orig_mod.{name}": value for name, value in model.state_dict().items()}


FORMS = {
    "plain": lambda m: m.state_dict(),
    "compiled": compiled,
    "blocks compiled": lambda m: {n.replace(".0.", ".0._orig_mod.", 1): v for n, v in m.state_dict().items()},
    "parallel": lambda m: torch.nn.DataParallel(m).state_dict(),
    "parallel and compiled": lambda m: {f"module.{name}": value for name, value in compiled(m).items()},
    "averaged": lambda m: {"model_ema": torch.optim.swa_utils.AveragedModel(m).state_dict()},
    "timm's average": lambda m: {"state_dict_ema": m.state_dict(), "epoch": 3},
    "lightning": lambda m: {"state_dict": Lightning(m).state_dict(), "hyper_parameters": {"lr": 0.1}},
    "lightning and compiled": lambda m: {"state_dict": {f"model.{n}": v for n, v in compiled(m).items()}},
    "a script's arguments": lambda m: {"model": m.state_dict(), "args": argparse.Namespace(lr=0.1, b=[1])},
    "a measured accuracy": lambda m: {"model": m.state_dict(), "best": np.float64(76.1), "n": np.int64(3)},
}


@pytest.mark.parametrize("form", FORMS)
def test_wrappers_are_understood(tmp_path, trained, form):
    state, _, told = load(tmp_path, FORMS[form](trained))
    assert_same(state, trained.state_dict())
    left_out = ["1 entries beside model.* left out, such as loss.weight"] * (form == "lightning")
    assert told == left_out


def test_a_head_of_another_shape_starts_fresh(tmp_path, trained):
    state, before, told = load(tmp_path, trained.state_dict(), THREE)
    head = ("fc.weight", "fc.bias")
    assert_same(state, trained.state_dict(), but=head)
    assert_same({name: state[name] for name in head}, {name: before[name] for name in head})
    assert told == ["the head fc starts fresh (10 classes there, 3 here)"]


def test_a_missing_head_starts_fresh(tmp_path, trained):
    body = {name: value for name, value in trained.state_dict().items() if not name.startswith("fc.")}
    state, before, told = load(tmp_path, body, THREE)
    assert_same(state, body)
    assert torch.equal(state["fc.weight"], before["fc.weight"])
    assert told == ["the head fc starts fresh (not there; 3 classes here)"]


@pytest.mark.parametrize("name", ["torchvision:mobilenet_v2", "torchvision:squeezenet1_1"])
def test_heads_under_other_names(tmp_path, name):
    theirs = {"name": name, "num_classes": 7, "arguments": {}}
    torch.manual_seed(1)
    trained = build_model(theirs).state_dict()
    state, _, told = load(tmp_path, trained, {**theirs, "num_classes": 3})
    layer = "classifier.1"
    assert_same(state, trained, but=(f"{layer}.weight", f"{layer}.bias"))
    assert told == [f"the head {layer} starts fresh (7 classes there, 3 here)"]


def test_only_the_head_may_differ(tmp_path, trained):
    other = build_model({**TEN, "name": "resnet32"}).state_dict()
    with pytest.raises(ValueError, match=r"another model's.*layer1\.3\.conv1\.weight"):
        load(tmp_path, other, THREE)


def test_the_random_generator_goes_on_as_before(tmp_path, trained):
    torch.manual_seed(2)
    build_model(THREE)
    expected = torch.rand(1)
    load(tmp_path, trained.state_dict(), THREE)
    assert torch.equal(torch.rand(1), expected)


def test_a_key_says_which_of_several(tmp_path, trained):
    average = {name: value + 1 for name, value in trained.state_dict().items()}
    content = {"model": trained.state_dict(), "model_ema": average, "nets": {"student": average}}
    state, _, told = load(tmp_path, content)
    assert_same(state, trained.state_dict())
    assert told == ["under model; weights_key=model_ema takes the others"]
    for key in ("model_ema", "nets.student"):
        state, _, told = load(tmp_path, content, key=key)
        assert_same(state, average)
        assert told == [f"under {key}"]
    with pytest.raises(ValueError, match=r"no 'model_em' of weights_key.*did you mean 'model_ema'\?"):
        load(tmp_path, content, key="model_em")
    with pytest.raises(ValueError, match=r"name it, model\.weights_key=KEY: nets"):
        load(tmp_path, {"nets": content["nets"]})


def test_a_key_is_for_torch_files(tmp_path, trained):
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    safetensors.save_file(trained.state_dict(), tmp_path / "w.safetensors")
    for path, expected in ((tmp_path, "this is a folder"), (tmp_path / "w.safetensors", "leave weights_key")):
        with pytest.raises(ValueError, match=expected):
            load_weights(trained, path, "model_ema")


class Custom:
    pass


def test_a_whole_model_is_refused_with_the_way_out(tmp_path, trained):
    for content in (trained, {"model": trained.state_dict(), "extra": Custom()}):
        with pytest.raises(ValueError, match=r"nothing of a file is executed here; where it was made, store"):
            load(tmp_path, content)
