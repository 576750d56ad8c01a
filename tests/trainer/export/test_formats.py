import numpy as np
import pytest
import torch

from trainer.checkpoints.saved_model import load_model, plain_state, save_model
from trainer.checkpoints.weights import load_weights
from trainer.cli.main import main
from trainer.models import get_model


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    model = get_model("resnet20", 10)
    with torch.no_grad():
        model.fc.weight.mul_(torch.rand_like(model.fc.weight) > 0.9)
    described = {"name": "resnet20", "num_classes": 10, "arguments": {}, "input_shape": [3, 32, 32]}
    info = {"model": {**described, "mean": [0.5] * 3, "std": [0.2] * 3}, "config": {}}
    save_model(tmp_path / "sparse", model, info)
    return tmp_path / "sparse"


@pytest.mark.slow
def test_onnx_computes_the_same_logits_for_any_batch(saved, tmp_path, capsys):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    out = tmp_path / "model.onnx"
    assert main(["export", str(saved), "--format", "onnx", "--out", str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    session = onnxruntime.InferenceSession(str(out))
    model, _ = load_model(saved)
    for batch in (1, 3):
        images = torch.randn(batch, 3, 32, 32)
        (logits,) = session.run(["logits"], {"images": images.numpy()})
        with torch.no_grad():
            assert np.allclose(logits, model.eval()(images), atol=1e-4)
    assert session.get_modelmeta().custom_metadata_map["mean"] == "[0.5, 0.5, 0.5]"


@pytest.mark.parametrize(("kind", "suffix"), [("safetensors", "safetensors"), ("torch", "pth")])
def test_tensors_come_back_as_weights(saved, tmp_path, kind, suffix, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(saved), "--format", kind]) == 0
    model = get_model("resnet20", 10)
    load_weights(model, tmp_path / f"sparse.{suffix}")
    for name, value in load_model(saved)[0].state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


def test_what_cannot_be_exported_is_said(tmp_path, capsys):
    assert main(["export", str(tmp_path), "--format", "torch", "--out", str(tmp_path / "x.pth")]) == 2
    assert "is not a checkpoint" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_masks_of_a_training_state_are_multiplied_into_its_weights():
    weight, mask = torch.tensor([[1.0, 2.0]]), torch.tensor([[True, False]])
    plain = plain_state({"fc.weight": weight, "fc.mask": mask, "fc.bias": torch.ones(1)})
    assert {name: value.tolist() for name, value in plain.items()} == {
        "fc.weight": [[1.0, 0.0]],
        "fc.bias": [1.0],
    }
    with pytest.raises(ValueError, match=r"no weight that fits it, for fc\.weight"):
        plain_state({"fc.mask": mask})
