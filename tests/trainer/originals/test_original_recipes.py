"""The paper's YAML files, written here from what is recorded of them, become our recipes."""

import copy

import pytest
import yaml

from tests.slow import slow
from tests.trainer.config.test_recipes import RECIPES, acdc_of
from tests.trainer.runs import starts
from trainer.cli.main import main
from trainer.config.load import load_config
from trainer.originals.recipes import Command, import_config

KINDS = ("pruners", "recyclers")
FIRST, *OTHERS = RECIPES


def original(record):
    """The file, in the original's format."""
    modules = {"modules": record["pruned_modules"]}
    parts = {kind: {name: {**part, **modules} for name, part in record[kind].items()} for kind in KINDS}
    trainer = {"optimizer": record["optimizer"], "lr_scheduler": record["lr_scheduler"]}
    return {**{k: v for k, v in parts.items() if v}, "trainers": {"default_trainer": trainer}}


def write(path, content):
    path.write_text(yaml.safe_dump(content))
    return path


def layers(config):
    acdc = acdc_of(config)
    return list(acdc.layers), acdc.actions


@pytest.mark.parametrize("recipe", [FIRST, *slow(*OTHERS)])
def test_import_gives_our_recipe(recipe, recorded, tmp_path, capsys):
    record, ours = recorded[RECIPES[recipe]], load_config(recipe, starts(recipe))
    path = write(tmp_path / "theirs.yaml", original(record))
    arguments = ["import", str(path), "--epochs", str(record["total_epochs"])]
    arguments += ["--batch-size", str(ours.data.batch_size)]
    if not record["pruned_modules"]:  # then the file does not show its network
        assert main(arguments) == 2
        assert "name it with --arch" in capsys.readouterr().err
        arguments += ["--arch", ours.model.name]
    assert main(arguments) == 0
    imported = load_config(str(tmp_path / "theirs.acdc.yaml"))
    assert imported.model.name == ours.model.name
    assert imported.data.name == ours.data.name
    assert imported.data.batch_size == ours.data.batch_size
    for section in ("epochs", "optimizer", "lr"):
        assert getattr(imported, section) == getattr(ours, section)
    assert layers(imported) == layers(ours)
    assert main(arguments) == 2
    assert "exists already" in capsys.readouterr().err


def test_the_number_of_epochs_is_asked_for_where_the_file_does_not_tell(recorded, tmp_path):
    name = RECIPES["cifar100/wide_resnet_freq20_50"]
    with pytest.raises(ValueError, match=r"prunes in epoch 170.*give their number with --epochs"):
        import_config(write(tmp_path / "theirs.yaml", original(recorded[name])), Command())


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda c: c["trainers"]["default_trainer"]["optimizer"].update({"class": "Adam"}), "optimizer Adam"),
        (lambda c: c["trainers"]["default_trainer"]["lr_scheduler"].update({"class": "X"}), "lr_scheduler X"),
        (lambda c: c["trainers"]["default_trainer"].pop("optimizer"), "no 'optimizer' where"),
        (lambda c: c.update({"regularizers": {"a": 1}}), "regularizers has no counterpart"),
        (lambda c: c["pruners"]["pruner_1"].update({"class": "Fisher"}), "have no counterpart here"),
        (lambda c: c["pruners"]["pruner_2"].update(modules=["conv1"]), "prune different layers"),
        (
            lambda c: [p.update(modules=["nowhere"]) for k in KINDS for p in c[k].values()],
            "no network here has all",
        ),
        (lambda c: c.update(recyclers={}), "two sparse phases follow each other"),
        (lambda c: c["pruners"]["pruner_1"].update(epochs=[1, 2]), "not enough values"),
        (lambda c: c["pruners"]["pruner_1"].update(keep_pruned=True), "keep_pruned: True"),
        (lambda c: c["recyclers"]["recycler_1"].update({"class": "Other"}), "recycler Other"),
        (lambda c: c["recyclers"]["recycler_1"].update(modules=["conv1"]), "leaves pruned layers out"),
        (lambda c: c["trainers"]["default_trainer"]["optimizer"].update(dampening=0.5), "dampening has no"),
        (lambda c: c["trainers"].update(other={}), "more trainers"),
    ],
)
def test_what_has_no_counterpart_is_named(recorded, tmp_path, change, expected):
    content = copy.deepcopy(original(recorded[RECIPES["imagenet/resnet50_90"]]))
    change(content)
    path = write(tmp_path / "theirs.yaml", content)
    with pytest.raises(ValueError, match=expected) as caught:
        import_config(path, Command())
    assert str(path) in str(caught.value)


def test_what_is_no_recipe_is_refused(tmp_path, capsys):
    for text, expected in (("- 1", "not a mapping"), ("a: [", "expected"), ("a: 1", "has no counterpart")):
        path = tmp_path / "theirs.yaml"
        path.write_text(text)
        assert main(["import", str(path)]) == 2
        error = capsys.readouterr().err
        assert expected in error
        assert "Traceback" not in error
    assert main(["import", str(tmp_path / "nowhere.yaml")]) == 2
    assert "nowhere.yaml" in capsys.readouterr().err
    assert not (tmp_path / "theirs.acdc.yaml").exists()
