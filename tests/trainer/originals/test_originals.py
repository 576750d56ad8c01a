import json
import os
import random

import numpy as np
import pytest
import torch

from data.datasets.cifar import CIFAR10
from sparsity import ACDC, GlobalMagnitude, PhaseSchedule
from tests.data.datasets.test_cifar import write_python
from tests.hostile import Evil
from trainer.checkpoints.saved_model import load_model
from trainer.cli.main import main
from trainer.models import get_model
from trainer.originals import load_original
from trainer.originals.checkpoints import OriginalError, read_original, split_state


@pytest.fixture
def original(golden):
    return golden / "checkpoints" / "resnet20_original.ckpt"


@pytest.fixture
def expected(golden):
    return np.load(golden / "checkpoints" / "resnet20_expected.npz")


@pytest.mark.parametrize("arch", ["resnet20", None])
def test_weights_masks_and_logits_of_a_real_checkpoint(original, expected, arch):
    model, masks = load_original(original, arch)
    for key in expected:
        if key.startswith("weight/"):
            assert np.array_equal(model.state_dict()[key.removeprefix("weight/")], expected[key]), key
    recorded = {
        key.removeprefix("mask/"): expected[key].astype(bool) for key in expected if key.startswith("mask/")
    }
    for layer, mask in recorded.items():
        if mask.all():
            assert layer not in masks
        else:
            assert np.array_equal(masks[layer], mask)
    with torch.no_grad():
        logits = model.eval()(torch.from_numpy(expected["x"])).numpy()
    assert np.linalg.norm(logits - expected["logits"]) <= 1e-5 * np.linalg.norm(expected["logits"])


def test_sparsity_is_the_recipes(original):
    _, masks = load_original(original)
    kept, total = sum(int(m.sum()) for m in masks.values()), sum(m.numel() for m in masks.values())
    assert 1 - kept / total == pytest.approx(0.9, abs=1e-4)


@pytest.mark.parametrize(
    ("recorded", "ours", "classes"),
    [
        ("resnet50", "resnet50", 1000),
        ("mobilenet", "mobilenetv1", 1000),
        ("wideresnet", "wide_resnet28_10", 100),
    ],
)
def test_keys_of_the_published_checkpoints_fit(recorded, ours, classes, golden):
    keys = json.loads((golden / "checkpoints" / "keys.json").read_text())[recorded]
    with torch.device("meta"):
        masks, plain = split_state({key: torch.empty(shape) for key, shape in keys.items()})
        model = get_model(ours, classes)
    assert {k: v.shape for k, v in plain.items()} == {k: v.shape for k, v in model.state_dict().items()}
    acdc = ACDC(model, GlobalMagnitude(0.9), PhaseSchedule.parse("sparse 1"), 1)
    assert set(masks) == set(acdc.masks())


def test_another_architecture_is_refused_with_the_layers_named(original):
    with pytest.raises(OriginalError, match=r"is not a resnet32: it lacks layer1\.3\.conv1\.weight, .* more"):
        load_original(original, "resnet32")
    with pytest.raises(OriginalError, match="is not a mobilenetv1: it lacks"):
        load_original(original, "mobilenetv1")


def test_missing_layers_are_named(original, tmp_path):
    state = dict(read_original(original)["model_state_dict"])
    del state["module.layer1.0.bn1.weight"]
    torch.save({"model_config": {"arch": "resnet20"}, "model_state_dict": state}, tmp_path / "missing.ckpt")
    with pytest.raises(OriginalError, match=r"is not a resnet20: it lacks layer1\.0\.bn1\.weight"):
        load_original(tmp_path / "missing.ckpt")


@pytest.mark.parametrize("legacy", [False, True])
def test_nothing_is_executed(tmp_path, legacy):
    target = tmp_path / "executed"
    evil = Evil(os.system, f"touch {target}")
    content = {"model_state_dict": {"conv1._layer.weight": torch.ones(1)}, "epoch": evil}
    torch.save(content, tmp_path / "hostile.ckpt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(OriginalError, match=r"hostile\.ckpt"):
        load_original(tmp_path / "hostile.ckpt", "resnet20")
    assert not target.exists()


def test_truncated_and_foreign_files(original, tmp_path):
    whole, path = original.read_bytes(), tmp_path / "bad.ckpt"
    generator = random.Random(0)
    contents = [whole[: generator.randrange(len(whole))] for _ in range(10)] + [
        b"",
        b"no checkpoint",
        whole[:4],
    ]
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(OriginalError, match=r"bad\.ckpt"):
            load_original(path, "resnet20")
    torch.save([1, 2], path)
    with pytest.raises(OriginalError, match="not a checkpoint of the original"):
        load_original(path, "resnet20")
    with pytest.raises(OriginalError, match="no such file"):
        load_original(tmp_path / "nowhere.ckpt", "resnet20")


def test_imported_then_evaluated_it_gives_the_same_logits(original, expected, tmp_path, capsys):
    """By `acdc import`, `acdc eval`, and the loaded model itself."""
    out = tmp_path / "imported"
    assert main(["import", str(original), "--arch", "resnet20", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "20 sparse layers" in printed
    assert "sparsity 90.00" in printed
    model, _ = load_model(out)
    with torch.no_grad():
        logits = model.eval()(torch.from_numpy(expected["x"])).numpy()
    assert np.linalg.norm(logits - expected["logits"]) <= 1e-5 * np.linalg.norm(expected["logits"])
    write_python(tmp_path, CIFAR10)
    assert main(["eval", str(out), f"data.root={tmp_path}", "data.eval_batch_size=20"]) == 0
    printed = capsys.readouterr().out
    assert " 20 " in printed
    assert " fp32 " in printed  # on every machine
    assert main(["import", str(original), "--out", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["import", str(original), "--arch", "resnet50", "--out", str(tmp_path / "other")]) == 2
    assert "is not a resnet50: it lacks" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
