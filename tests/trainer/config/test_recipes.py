"""Our recipes against the record of the paper's experiments, epoch by epoch."""

import pytest
import torch

from sparsity import ACDC, NM, GlobalMagnitude, UniformMagnitude
from tests.trainer.runs import starts
from trainer.config.load import load_config
from trainer.config.recipes import recipe_names
from trainer.errors import UserError
from trainer.models import get_model
from trainer.optim import build_optimizer, learning_rate

RN50 = "iht_imagenet_resnet50_insta_cosinelr"
MBV1 = "iht_imagenet_mobilenet_insta_cosinelr"
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
    **{f"imagenet/resnet50_{s}": f"{RN50}_s{s}_ep100.yaml" for s in (50, 80, 90, 95, 98)},
    **{f"imagenet/resnet50_{s}_no_conv1_fc": f"{RN50}_s{s}_ep100_no_conv1_fc.yaml" for s in (80, 90, 95, 98)},
    **{f"imagenet/resnet50_uniform_{s}": f"{RN50}_s{s}_ep100_unif.yaml" for s in (90, 95)},
    **{f"imagenet/resnet50_uniform_{s}_ep200": f"{RN50}_s{s}_ep200_unif.yaml" for s in (90, 95)},
    "imagenet/resnet50_90_ep150": f"{RN50}_s90_ep150.yaml",
    "imagenet/resnet50_2_4": "iht_imagenet_resnet50_cosinelr_sp_2_4_ep100.yaml",
    **{f"imagenet/mobilenetv1_{s}": f"{MBV1}_s{s}_ep100.yaml" for s in (75, 90)},
    **{f"imagenet/mobilenetv1_{s}_no_conv1_dw": f"{MBV1}_s{s}_ep100_no_conv1_dw.yaml" for s in (75, 90)},
    "imagenet/resnet50_dense": "imagenet_resnet50_best_dense.yaml",
    "imagenet/mobilenetv1_dense": "imagenet_mobilenet_cosinelr_ep100_dense.yaml",
    "imagenet/resnet50_ftdense": f"{RN50}_ep100_ftdense.yaml",
    "imagenet/resnet50_ftdense_ep150": f"{RN50}_s90_ep150_ftdense.yaml",
    "imagenet/resnet50_ftdense_ep200": f"{RN50}_s90_ep200_ftdense.yaml",
    "imagenet/mobilenetv1_ftdense": f"{MBV1}_ep100_ftdense.yaml",
    **{f"imagenet/resnet50_gmp_{s}": f"imagenet_resnet50_gmp_sp{s}.yaml" for s in (80, 90)},
}
PATTERNS = {
    "UnstructuredMagnitudePruner": GlobalMagnitude,
    "MagnitudePruner": UniformMagnitude,
    "MagnitudeNMPruner": NM,
}
CLASSES = {"cifar10": 10, "cifar100": 100, "imagenet": 1000}


def acdc_of(config):
    """What the recipe does with its network, which is without values; a step is an epoch."""
    with torch.device("meta"):
        model = get_model(config.model.name, CLASSES[config.data.name], **config.model.arguments)
    sparsity = config.sparsity
    return ACDC(
        model,
        sparsity.build_pattern(),
        sparsity.build_schedule(),
        1,
        include=sparsity.include,
        exclude=sparsity.exclude,
        gradual=sparsity.build_gradual(),
    )


def test_every_recorded_experiment_has_a_recipe(recorded):
    assert sorted(RECIPES.values()) == sorted(recorded)
    own_folder = {"finetune", "imagefolder/resnet18_80", "imagefolder/resnet50_90"}
    evidence = {name for name in recipe_names() if name.startswith("fashion_mnist/")}  # no original's
    assert set(recipe_names()) == {"quickstart", *own_folder, *evidence, *RECIPES}


@pytest.mark.parametrize("recipe", [name for name in RECIPES if starts(name)])
def test_a_recipe_that_goes_on_from_something_asks_for_it(recipe):
    with pytest.raises(UserError, match=r"name its (folder, checkpoint=RUN|file, model\.weights=FILE)"):
        load_config(recipe)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_is_the_papers(recipe, recorded):
    theirs, ours = recorded[RECIPES[recipe]], load_config(recipe, starts(recipe))
    assert ours.epochs == theirs["total_epochs"]
    assert ours.data.name == theirs["dataset"]
    if theirs["batch_size"] is not None:
        assert ours.data.batch_size == theirs["batch_size"]
    optimizer = theirs["optimizer"]
    assert (ours.optimizer.name.upper(), ours.optimizer.lr) == (optimizer["class"], optimizer["lr"])
    for key in ("momentum", "weight_decay", "nesterov"):
        assert getattr(ours.optimizer, key) == optimizer[key], key
    (group,) = build_optimizer(ours.optimizer, torch.nn.Linear(1, 1)).param_groups
    for key in ("lr", "momentum", "weight_decay", "nesterov"):
        assert group[key] == optimizer[key], key
    rates = [learning_rate(ours.lr, ours.optimizer.lr, epoch, ours.epochs) for epoch in range(ours.epochs)]
    assert rates == pytest.approx(theirs["lr_per_epoch"][: ours.epochs], rel=1e-9, abs=1e-15)
    assert theirs["reset_momentum_after_decompress"] in (True, None)  # ours always does

    acdc = acdc_of(ours)
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
    assert {getattr(ours.data, "random_labels", 0)} == labels
    if labels != {0}:
        assert {ours.seed} == {script["manual_seed"] for script in theirs["used_by"]}
