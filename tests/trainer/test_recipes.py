"""Our recipes against the record of the paper's experiments, epoch by epoch."""

import json

import pytest
import torch

from sparsity import ACDC, NM, GlobalMagnitude, UniformMagnitude
from trainer.config import load_config
from trainer.models import get_model
from trainer.optim import learning_rate

WRN = "iht_cifar100_wideresnet_steplr"
RECIPES = {
    **{
        f"cifar100/wide_resnet_{f}_{s}": f"{WRN}_{f}_s{s}.yaml"
        for f in ("freq20", "dense13")
        for s in (50, 75, 90, 95)
    },
    **{
        f"cifar10/memorisation_{s}": f"iht_cifar10_resnet20_unstructured_insta_prune_freq20_{s}_constant.yaml"
        for s in (50, 75, 90, 95)
    },
    "cifar10/resnet20_dense": "cifar10_dense.yaml",
}
PATTERNS = {
    "UnstructuredMagnitudePruner": GlobalMagnitude,
    "MagnitudePruner": UniformMagnitude,
    "MagnitudeNMPruner": NM,
}
CLASSES = {"cifar10": 10, "cifar100": 100, "imagenet": 1000}


@pytest.fixture(scope="module")
def recorded(golden):
    return json.loads((golden / "recipes.json").read_text())


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_is_the_papers(recipe, recorded):
    theirs, ours = recorded["recipes"][RECIPES[recipe]], load_config(recipe)
    assert ours.epochs == theirs["total_epochs"]
    assert ours.data.name == theirs["dataset"]
    if theirs["batch_size"] is not None:
        assert ours.data.batch_size == theirs["batch_size"]
    optimizer = theirs["optimizer"]
    assert (ours.optimizer.name.upper(), ours.optimizer.lr) == (optimizer["class"], optimizer["lr"])
    for key in ("momentum", "weight_decay", "nesterov"):
        assert getattr(ours.optimizer, key) == optimizer[key], key
    rates = [learning_rate(ours.lr, ours.optimizer.lr, epoch, ours.epochs) for epoch in range(ours.epochs)]
    assert rates == pytest.approx(theirs["lr_per_epoch"][: ours.epochs], rel=1e-9, abs=1e-15)
    assert theirs["reset_momentum_after_decompress"] in (True, None)  # ours always does

    with torch.device("meta"):
        model = get_model(ours.model.name, CLASSES[ours.data.name], **ours.model.arguments)
    pattern, schedule = ours.sparsity.build_pattern(), ours.sparsity.build_schedule()
    acdc = ACDC(model, pattern, schedule, 1, include=ours.sparsity.include, exclude=ours.sparsity.exclude)
    compressions = {epoch: chosen for epoch, chosen in acdc.actions.items() if chosen is not None}
    assert sorted(compressions) == theirs["compress_epochs"]
    assert sorted(set(acdc.actions) - set(compressions)) == theirs["decompress_epochs"]
    sparsities = [compressions[epoch].sparsity for epoch in sorted(compressions)]
    assert sparsities == pytest.approx(theirs["compress_sparsity"], rel=1e-12)
    assert {type(chosen) for chosen in compressions.values()} == {
        PATTERNS[name] for name in theirs["pruner_classes"]
    }
    assert set(acdc.layers) == set(theirs["pruned_modules"])
    assert sum(layer.weight.numel() for layer in acdc.layers.values()) == theirs["num_prunable_weights"]
    labels = {script["num_random_labels"] for script in theirs["used_by"]} or {0}
    assert {ours.data.random_labels} == labels
    if ours.data.random_labels:
        assert {ours.seed} == {script["manual_seed"] for script in theirs["used_by"]}
