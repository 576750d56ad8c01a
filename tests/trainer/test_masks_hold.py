"""A model that uses weights past their masks: refused before the run, or ended at its first compressed step,
with the layers' names and exit code 2."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.trainer.runs import newest_run, tiny
from trainer.checkpoints import checkpoint
from trainer.models import MODELS
from trainer.train import main


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(16, 16), nn.Linear(16, 16)


class Net(nn.Module):
    """Like torchvision's Swin: some weights are handed to a functional; `always`, or in training alone."""

    def __init__(self, num_classes, in_channels, always):
        super().__init__()
        self.stem, self.head = nn.Linear(28 * 28 * in_channels, 16), nn.Linear(16, num_classes)
        self.blocks, self.always = nn.ModuleList([Attention(), Attention()]), always

    def forward(self, x):
        x = self.stem(x.flatten(1))
        for block in self.blocks:
            past = self.always or self.training
            x = functional.linear(x.relu(), block.qkv.weight) if past else block.qkv(x)
            x = block.proj(x.relu())
        return self.head(x)


@pytest.fixture(autouse=True)
def _own_model(monkeypatch):
    monkeypatch.setitem(MODELS, "swin_like", Net)


def run(tiny_data, tmp_path, always, *overrides):
    model = ["model.name=swin_like", f"model.arguments={{always: {str(always).lower()}}}"]
    arguments = [x for x in tiny(tiny_data, tmp_path, *overrides) if not x.startswith("model.")]
    return main([*arguments, *model])


def test_functional_use_is_refused_before_the_run_with_patterns_to_exclude(tiny_data, tmp_path, capsys):
    assert run(tiny_data, tmp_path, True, "sparsity.exclude=[head]") == 2
    error = capsys.readouterr().err
    assert "the model uses the weights of 2 layers past the layer's own forward pass" in error
    assert "blocks.0.qkv, blocks.1.qkv" in error
    cure = error[error.index("sparsity.exclude=") :].rstrip().rstrip("'")
    assert cure == 'sparsity.exclude=["head", "*.qkv"]'
    assert not (tmp_path / "quickstart").exists()
    assert run(tiny_data, tmp_path, True, cure) == 0


def test_a_leak_ends_the_run_at_the_first_compressed_step_and_loses_nothing(tiny_data, tmp_path, capsys):
    assert run(tiny_data, tmp_path, False) == 2
    error = capsys.readouterr().err
    assert "dropped weights are no longer 0, in blocks.0.qkv (" in error
    assert "Traceback" not in error
    folder = newest_run(tmp_path)
    saved = checkpoint.newest_whole(folder / "checkpoints")
    assert saved is not None
    state = checkpoint.read(saved, checkpoint.STATE)
    assert state["acdc"]["phase"] == "dense"
    assert state["position"]["epoch"] == 1
    assert all(torch.isfinite(value).all() for value in state["model"].values())


def test_frozen_layers_are_left_dense_in_a_run(tiny_data, tmp_path, monkeypatch, caplog):
    def frozen(num_classes, in_channels, always):
        net = Net(num_classes, in_channels, always)
        net.stem.weight.requires_grad_(False)
        return net

    monkeypatch.setitem(MODELS, "swin_like", frozen)
    exclude = 'sparsity.exclude=["*.qkv"]'
    assert run(tiny_data, tmp_path, True, exclude, "epochs=2", "sparsity.schedule=dense 1, sparse 1") == 0
    assert "frozen layers stay unmasked: stem" in caplog.text
    saved = checkpoint.newest_whole(newest_run(tmp_path) / "checkpoints")
    assert "stem.mask" not in checkpoint.read(saved, checkpoint.STATE)["model"]


def test_layers_of_an_unknown_kind_are_refused_with_the_patterns_that_exclude_them(
    tiny_data, tmp_path, capsys, monkeypatch
):
    class Centred(nn.Linear):
        def forward(self, input):
            return functional.linear(input, self.weight - self.weight.mean())

    def centred(num_classes, in_channels, always):
        net = Net(num_classes, in_channels, always)
        for block in net.blocks:
            block.proj.__class__ = Centred
        return net

    monkeypatch.setitem(MODELS, "swin_like", centred)
    assert run(tiny_data, tmp_path, True, 'sparsity.exclude=["head"]') == 2
    error = capsys.readouterr().err
    assert "Centred, a kind of its own" in error
    assert """leave it dense with 'sparsity.exclude=["head", "*.proj"]'""" in error
