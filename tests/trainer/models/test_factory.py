"""Networks of one's own, by the name of the function that makes them."""

import sys

import pytest
import torch

from tests.trainer.runs import final_state, run_here, tiny
from trainer.checkpoints import checkpoint
from trainer.checkpoints.saved_model import load_model
from trainer.cli.main import main as acdc
from trainer.models import get_model
from trainer.train import main

SOURCE = """
from torch import nn
from torchvision.transforms import functional

def small(num_classes, in_channels, width=8):
    return nn.Sequential(
        nn.Conv2d(in_channels, width, 3, 2), nn.BatchNorm2d(width), nn.ReLU(),
        nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * width, num_classes),
    )

def grey(num_classes):
    return small(num_classes, 1)

def features(num_classes):
    return nn.Flatten()

def fails(num_classes):
    return {}["weights"]

number, table = 3, lambda num_classes: {}
"""


@pytest.fixture
def networks(tmp_path, monkeypatch):
    """A module `own_networks` in the current folder, which is not on the path."""
    (tmp_path / "own_networks.py").write_text(SOURCE)
    (tmp_path / "own_broken.py").write_text("import torch\nimport does_not_exist\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    yield tmp_path
    for name in ("own_networks", "own_broken"):
        sys.modules.pop(name, None)


def test_a_function_is_called_with_what_it_takes(networks):
    model = get_model("own_networks:small", 7, in_channels=2, width=4)
    assert model(torch.randn(3, 2, 16, 16)).shape == (3, 7)
    assert get_model("own_networks:grey", 5, in_channels=1)(torch.randn(3, 1, 16, 16)).shape == (3, 5)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("own_network:small", {}, r"no module 'own_network', neither installed nor in .*PYTHONPATH"),
        ("own_package.net:small", {}, r"no module 'own_package'"),
        ("own_networks:smal", {}, r"own_networks.py has no function 'smal'; did you mean 'small'\?"),
        ("own_networks:number", {}, "has no function 'number'"),
        ("own_networks:small", {"depth": 8}, r"'depth'; it takes \(num_classes, in_channels, width=8\)"),
        ("own_networks:fails", {}, r"failed: KeyError: 'weights' \(\S+own_networks.py, line 18\)"),
        ("own_networks:functional", {}, "has no function 'functional'"),
        ("own_networks:table", {}, "gives a dict, not a torch.nn.Module"),
        ("builtins:dict", {}, "not of torch or of Python itself"),
        ("own_broken:net", {}, r"importing own_broken failed: ModuleNotFoundError: No module .*line 2\)"),
        (".net:small", {}, "write package.module:function"),
        ("resnet51", {}, "One of: .*package.module:function"),
    ],
)
def test_mistakes_are_named(networks, name, arguments, message):
    with pytest.raises(ValueError, match=message):
        get_model(name, 7, in_channels=1, **arguments)


def test_a_checkpoint_cannot_name_what_runs_any_code(tmp_path):
    """torch.hub.load takes any keyword, and runs the hubconf.py of a folder or of a repository."""
    done = tmp_path / "executed"
    (tmp_path / "hubconf.py").write_text(f"open({str(done)!r}, 'w').close()\ndef net(**_): ...")
    model = {
        "name": "torch.hub:load",
        "num_classes": 10,
        "input_shape": [1, 28, 28],
        "mean": [0.5],
        "std": [0.5],
    }
    model["arguments"] = {"repo_or_dir": str(tmp_path), "model": "net", "source": "local"}
    checkpoint.save(tmp_path / "sparse", {checkpoint.MODEL: {}}, {"model": model, "config": {}})
    with pytest.raises(ValueError, match="not of torch or of Python itself"):
        load_model(tmp_path / "sparse")
    assert not done.exists()


def test_a_model_that_gives_no_logits_is_refused_before_the_run(networks, tiny_data, capsys):
    arguments = ["model.name=own_networks:features", "model.arguments={}", "sparsity.schedule=dense 6"]
    assert main(tiny(tiny_data, networks / "runs", *arguments)) == 2
    error = capsys.readouterr().err
    assert "it gives (1, 784) for one image, where logits of 10 classes are (1, 10)" in error


def test_it_trains_resumes_is_evaluated_and_exported(networks, tiny_data, capsys):
    own = ["model.name=own_networks:small", "model.arguments={width: 12}"]
    run = run_here(tiny_data, networks / "runs", *own)
    assert final_state(run)["model"]["0.weight"].shape == (12, 1, 3, 3)
    (run / "result.json").unlink()
    assert main(tiny(tiny_data, networks / "runs", *own, f"resume={run}")) == 0
    assert acdc(["eval", str(run)]) == 0
    assert acdc(["export", str(run), "--format", "safetensors"]) == 0
    assert (networks / "sparse.safetensors").exists()
    capsys.readouterr()
    (networks / "own_networks.py").unlink()
    sys.modules.pop("own_networks")
    assert acdc(["eval", str(run)]) == 2
    assert "no module 'own_networks', neither installed nor in" in capsys.readouterr().err
