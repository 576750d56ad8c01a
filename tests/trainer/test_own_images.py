"""From a folder of one's own and a network of other classes to a pair of models: the recipe `finetune`."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from tests.slow import slow
from tests.trainer.runs import assert_equal_states, final_state
from trainer.checkpoints import checkpoint
from trainer.checkpoints.saved_model import build_model
from trainer.cli.main import main as acdc_command
from trainer.train import main

pytestmark = pytest.mark.usefixtures("needs_runs")
TEN = {"name": "resnet20", "num_classes": 10, "arguments": {}}


@pytest.fixture
def folder(tmp_path):
    """Three colours with noise, 20 images each, three of them GIFs."""
    random = np.random.default_rng(0)
    for channel, name in enumerate(("red", "green", "blue")):
        (tmp_path / "colours" / name).mkdir(parents=True)
        for i in range(20):
            pixels = random.integers(0, 120, (36, 44, 3), np.uint8)
            pixels[..., channel] += 120
            Image.fromarray(pixels).save(tmp_path / "colours" / name / f"{i}.{'jpg' if i else 'gif'}")
    return tmp_path / "colours"


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(1)
    state = build_model(TEN).state_dict()
    torch.save({"model": {f"module._orig_mod.{n}": v for n, v in state.items()}}, tmp_path / "ten.pth")
    return tmp_path / "ten.pth"


def finetune(folder, weights, *overrides):
    return [
        "finetune",
        f"data.root={folder}",
        f"model.weights={weights}",
        "model.name=resnet20",
        f"run_root={folder.parent / 'runs'}",
        *("epochs=4", "sparsity.schedule=(dense 1, sparse 1) x2", "optimizer.lr=0.05"),
        *("data.batch_size=9", "data.image_size=32", "data.eval_resize=36", "data.eval_size=32"),
        *("engine.compile=false", "engine.precision=fp32", "sparsity.accelerate=off", "data.num_threads=1"),
        *overrides,
    ]


@pytest.mark.parametrize("backend", ["dali", *slow("torch")])
def test_a_folder_and_a_pretrained_network_are_enough(folder, weights, backend, capsys, caplog):
    caplog.set_level("WARNING")
    assert main(finetune(folder, weights, f"data.backend={backend}", "model.freeze=[conv1, bn1]")) == 0
    (run,) = (folder.parent / "runs" / "finetune").iterdir()
    said = capsys.readouterr().out
    assert "45 training and 12 test images" in said
    assert "3 classes (blue, green, red), no val folder: 20 % of each class split off" in said
    assert f"weights     {weights}; the head fc starts fresh (10 classes there, 3 here)" in said
    assert "frozen      conv1, bn1: " in said
    assert "formats that are not read: 3 .gif" in caplog.text
    result = json.loads((run / "result.json").read_text())
    assert result["sparse"]["num_images"] == 12
    assert result["sparse"]["sparsity"] == pytest.approx(0.8, abs=1e-3)
    assert result["sparse"]["top1"] > 60  # colours are easily told apart
    assert acdc_command(["eval", str(run)]) == 0
    assert f"{result['sparse']['top1']:.2f}" in capsys.readouterr().out  # on the same images


@pytest.mark.rare
def test_statistics_go_along_with_the_run(folder, weights):
    """Through a resume without the weights' file, and to a run that starts from this one."""
    half = ["data.mean=[0.5, 0.5, 0.5]", "data.std=[0.25, 0.25, 0.25]"]
    short = ["epochs=2", "sparsity.schedule=dense 1, sparse 1"]
    assert main(finetune(folder, weights, *half, *short)) == 0
    (run,) = (folder.parent / "runs" / "finetune").iterdir()
    whole = final_state(run, 10)
    weights.unlink()
    point = checkpoint.step_folder(run / "checkpoints", 5)
    assert main(finetune(folder, weights, *short, f"resume={point}")) == 0  # the recipe no longer says them
    assert_equal_states(final_state(run, 10), whole)
    assert main(finetune(folder, run, *short, "name=next")) == 0
    (after,) = (folder.parent / "runs" / "next").iterdir()
    info = checkpoint.read_info(after / "checkpoints" / "sparse")
    assert info["model"]["mean"] == [0.5] * 3
    assert info["model"]["std"] == [0.25] * 3
