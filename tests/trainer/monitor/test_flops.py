"""FLOPs of whole runs: training at the sizes trained on, inference at evaluation's."""

import json
import shutil

import pytest
import torch

from data.torchvision_import import import_torchvision
from sparsity import count_flops
from tests.trainer.runs import newest_run, step_folder, tiny_images
from trainer.checkpoints import checkpoint
from trainer.checkpoints.saved_model import load_model
from trainer.checkpoints.state import Position
from trainer.config.data import ArrayData, ImageNetData
from trainer.models import get_model
from trainer.monitor.flops import RunFlops
from trainer.train import main

NET = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 1, 2), torch.nn.ReLU(), torch.nn.Conv2d(16, 32, 1))
IMAGES = 2 * 8  # an epoch
SMALL = {"depth": 8}


def growing(*sizes):
    return ImageNetData(name="imagenet", batch_size=8, image_sizes=[list(pair) for pair in sizes])


def test_each_epoch_counts_at_its_own_size():
    flops = RunFlops.count(NET, growing((0, 32), (2, 48)), (3, 64, 64))
    assert flops.inference == count_flops(NET, (3, 64, 64))
    assert [flops.at(epoch) for epoch in range(4)] == [
        count_flops(NET, (3, side, side)) for side in (32, 32, 48, 48)
    ]
    assert flops.calls() == {
        "0": [(256, 32, 32), (576, 48, 48)],
        "2": [(256, 16, 16), (576, 24, 24)],
    }  # at every size that 2:4 kernels meet


def test_images_in_memory_are_trained_on_as_they_are():
    flops = RunFlops.count(NET, ArrayData(name="cifar10", batch_size=8), (3, 64, 32))
    assert flops.at(7) == flops.inference == count_flops(NET, (3, 64, 32))
    assert flops.calls() == {"0": [(512, 64, 32)], "2": [(512, 32, 16)]}


def test_a_size_that_the_model_does_not_take_is_named():
    with torch.device("meta"):
        model = import_torchvision().models.vit_b_16()
    with pytest.raises(ValueError, match=r"it does not take images of shape \(3, 160, 160\): Wrong image"):
        RunFlops.count(model, growing((0, 160), (2, 224)), (3, 224, 224))


def test_an_old_checkpoint_counted_layers_calls_alone():
    """Of a ViT, where much multiplies besides. One epoch of three had half of the called layers' weights."""
    with torch.device("meta"):
        model = import_torchvision().models.vit_b_16()
    flops = RunFlops.count(model, growing((0, 224)), (3, 224, 224))
    called = [layer for layer in flops.inference.layers if layer.calls]
    old = sum(3 * layer.flops(density) for layer in called for density in (1, 1, 0.5))
    position = Position(epoch=3, training_flops=IMAGES * old)
    flops.recount(position, IMAGES)
    dense, half = flops.at(0).training(), flops.at(0).training({layer.name: 0.5 for layer in called})
    assert position.dense_training_flops == pytest.approx(IMAGES * 3 * dense)
    assert position.training_flops == pytest.approx(IMAGES * (2 * dense + half))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Trained on 24 and 32 pixels, evaluated on 64."""
    return train(tmp_path_factory.mktemp("runs"))


def train(folder, *overrides):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    options = [
        "data.backend=synthetic",
        "data.image_sizes=[[0, 24], [1, 32]]",
        "data.eval_resize=64",
        "data.eval_size=64",
        "model.name=resnet_cifar",
        f"model.arguments={SMALL}",
        "steps_per_epoch=2",
        "epochs=2",
        "sparsity.schedule=dense 1, sparse 1",
        "save.every=1st",
        "save.keep=9",
    ]
    assert main(tiny_images(folder, folder, *options, *overrides)) == 0
    return newest_run(folder, "mobilenetv1_90")


def result(run):
    return json.loads((run / "result.json").read_text())["flops"]


def density(run):
    """Of the sparse model, by layer."""
    weights = load_model(run / "checkpoints" / "sparse")[0].state_dict()
    names = [name for name in weights if name.endswith("weight") and weights[name].dim() > 1]
    return {name.removesuffix(".weight"): (weights[name] != 0).double().mean().item() for name in names}


def at(side):
    return count_flops(get_model("resnet_cifar", 1000, **SMALL), (3, side, side))


def test_training_counts_at_the_sizes_trained_on(run):
    flops, kept = result(run), density(run)
    assert flops["inference_dense"] == at(64).forward()
    assert flops["inference_sparse"] == pytest.approx(at(64).forward(kept))
    assert flops["training_dense"] == IMAGES * (at(24).training() + at(32).training())
    assert flops["training"] == pytest.approx(IMAGES * (at(24).training() + at(32).training(kept)))
    assert flops["training_ratio"] == flops["training"] / flops["training_dense"]


def test_one_size_below_evaluations(tmp_path):
    run = train(tmp_path, "data.image_sizes=[]")
    flops, kept = result(run), density(run)
    assert flops["training_dense"] == 2 * IMAGES * at(32).training()
    assert flops["training"] == pytest.approx(IMAGES * (at(32).training() + at(32).training(kept)))


@pytest.mark.parametrize("step", [1, 3])
def test_a_resumed_run_counts_as_the_uninterrupted_one(run, tmp_path, step):
    copy = shutil.copytree(run, tmp_path / "mobilenetv1_90" / run.name)
    assert result(train(tmp_path, f"resume={step_folder(copy, step)}")) == result(run)


def test_a_run_resumed_from_an_old_checkpoint(run, tmp_path):
    """Before, dense training was not counted along, and all was counted at evaluation's size."""
    copy = shutil.copytree(run, tmp_path / "mobilenetv1_90" / run.name)
    old = step_folder(copy, 4)
    state, info = checkpoint.read(old, checkpoint.STATE), checkpoint.read_info(old)
    del state["position"]["dense_training_flops"]
    counted = at(64).training() + at(64).training(density(run))
    state["position"]["training_flops"] = IMAGES * counted
    checkpoint.save(old, {checkpoint.STATE: state}, info)
    (copy / "result.json").unlink()
    flops, expected = result(train(tmp_path, f"resume={old}")), result(run)
    assert flops["training_dense"] == expected["training_dense"]
    assert flops["training_ratio"] == pytest.approx(counted / (2 * at(64).training()))


def test_a_branch_takes_over_what_was_counted(run, tmp_path):
    """At the sizes that the other run had trained on."""
    twin = run / "checkpoints" / "dense_twin"
    branch = train(
        tmp_path, f"checkpoint={twin}", "sparsity={schedule: dense 2}", "data.image_sizes=[[0, 40]]"
    )
    flops = result(branch)
    assert flops["training_dense"] == flops["training"] == IMAGES * (at(24).training() + at(40).training())
