"""What of a recipe may change when a run goes on."""

from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from tests.trainer.runs import SCHEDULE
from trainer.config.changes import BEGINNING, FIXED, FREE, FROM_HERE, changes, check_changes, with_beginning
from trainer.config.load import load_config

ROOT = Path(__file__).parents[3]
START = ("epochs=6", f"sparsity.schedule={SCHEDULE}")  # dense and sparse in turn, an epoch each


def recipe(*overrides, name="quickstart"):
    return load_config(name, [*(START if name == "quickstart" else ()), *overrides])


def at(epoch, step=0, **pair):
    return {"epoch": epoch, "step": step, "pair": {key: {"epoch": last} for key, last in pair.items()}}


def changed(*overrides, before=()):
    config = recipe(*overrides)
    return changes(recipe(*before).model_dump(mode="json"), config), config


def told(*overrides, before=()):
    return {change.key: (change.then, change.now) for change in changed(*overrides, before=before)[0]}


def refusal(position, *overrides, before=()):
    found, config = changed(*overrides, before=before)
    with pytest.raises(ValueError, match="the recipe contradicts what was trained so far: ") as refused:
        check_changes(found, config, position)
    return str(refused.value)


def accept(position, *overrides, before=()):
    found, config = changed(*overrides, before=before)
    assert found
    check_changes(found, config, position)
    return {change.key for change in found}


def test_every_field_is_in_one_list():
    """Whoever adds a field says here what its change does to a run that goes on."""
    keys = set()
    for name in ("quickstart", "imagenet/resnet50_90"):
        content = recipe(name=name).model_dump(mode="json")
        for key, value in content.items():
            inner = isinstance(value, dict) and key not in ("mixing", "ema")
            keys |= {f"{key}.{each}" for each in value} if inner else {key}
    assert len(keys) > 70
    lists = (BEGINNING, FREE, FROM_HERE, FIXED)
    for key in keys:
        assert sum(fnmatchcase(key, each) for entries in lists for each in entries) == 1, key
    for entries in lists:
        for each in entries:
            assert any(fnmatchcase(key, each) for key in keys), each


def test_the_list_is_in_the_documents():
    page = (ROOT / "docs" / "machines.md").read_text()
    for entries in (BEGINNING, FREE, FROM_HERE, FIXED):
        for each in entries:
            section, _, field = each.partition(".")
            assert f"`{each}`" in page or (field and f"`{field}`" in page and f"`{section}`" in page), each


def test_changes_are_found_with_their_values():
    assert told() == {}
    assert told("optimizer.lr=0.01", "save.every=3st", "resume=auto", "mixing.mixup=0.2") == {
        "optimizer.lr": (0.05, 0.01),
        "save.every": ("1ep", "3st"),
        "mixing": (None, {"mixup": 0.2, "cutmix": 0.0, "probability": 1.0, "switch": 0.5}),
    }
    spelt = "sparsity.schedule=dense 1, sparse 1, dense 1, sparse 1, dense 1, sparse 1"
    assert told(spelt) == {}


def test_a_recipe_of_an_earlier_version_is_compared_by_what_it_has():
    past = recipe().model_dump(mode="json")
    del past["ema"], past["optimizer"]["clip_norm"]
    assert changes(past, recipe("optimizer.clip_norm=1.0"))[0].then == 0  # the default that it had
    past["checkpoints"] = {"every": "1ep"}  # a section of then
    past["optimizer"]["lr"] = 0.1
    assert [change.key for change in changes(past, recipe("ema.decay=0.9"))] == ["optimizer.lr"]
    for nothing in (None, [], {}, {"optimizer": None}):
        assert changes(nothing, recipe()) == []
        assert with_beginning(recipe(), nothing) == recipe()


@pytest.mark.parametrize(
    "override",
    ["seed=2", "data.augment=rand", "data.batch_size=32", "model.freeze=[conv1]", "optimizer.name=adamw"],
)
def test_what_contradicts_the_past_is_refused(override):
    change = ["optimizer={name: adamw, lr: 0.05}"] if "adamw" in override else [override]
    text = refusal(at(1), *change)
    assert f"{override.partition('=')[0]} was " in text
    assert "with checkpoint= in place of resume=" in text


def test_all_contradictions_are_named():
    text = refusal(at(2), "seed=2", "data.flip=false", "optimizer.lr=0.01")
    assert "seed was 1, is 2; data.flip was True, is False" in text
    assert "optimizer.lr" not in text


@pytest.mark.parametrize(
    ("position", "schedule", "expected"),
    [
        (at(3), "dense 3, sparse 3", "but epoch 1 was sparse, not dense"),
        (at(1, step=4), "dense 3, sparse 3", "but epoch 1 was sparse, not dense"),
        (at(5), "dense 1, sparse 1, dense 1", "but 5 epochs have begun"),
        # the last dense phase would have been one whose end nobody kept
        (
            at(4),
            "dense 1, (sparse 1, dense 1) x1, sparse 3",
            "last dense phase ended with epoch 2, when no dense_twin",
        ),
        (
            at(5, dense_twin=4),
            "dense 1, (sparse 1, dense 1) x2, dense 1",
            "last sparse phase ended with epoch 3",
        ),
    ],
)
def test_a_schedule_with_another_past_is_refused(position, schedule, expected):
    num_epochs = 3 if schedule.endswith("sparse 1, dense 1") else 6
    assert expected in refusal(position, f"sparsity.schedule={schedule}", f"epochs={num_epochs}")


def test_a_schedule_may_change_where_it_has_not_been():
    assert accept(at(1), "sparsity.schedule=dense 3, sparse 3") == {"sparsity.schedule"}
    accept(at(0, step=9), "sparsity.schedule=dense 3, sparse 3")
    longer = "sparsity.schedule=dense 1, (sparse 1, dense 1) x3, sparse 3"
    accept(at(6, dense_twin=4, sparse=5), longer, "epochs=10")
    accept(at(5, dense_twin=4), "sparsity.schedule=dense 1, (sparse 1, dense 1) x2, sparse 4", "epochs=9")
    # a branch that began behind its last dense phase never had a twin: that is no change
    longer = "sparsity.schedule=dense 2, sparse 8"
    accept(at(4), longer, "epochs=10", before=["sparsity.schedule=dense 2, sparse 4"])


def test_masks_may_change_while_a_compression_goes_by_it():
    accept(at(4), "sparsity.target=0.95")  # that of epoch 5
    accept(at(5), "sparsity.target=0.95")
    accept(at(4, step=9), "sparsity.pattern=2:4", "sparsity.target=null")
    text = refusal(at(5, step=1), "sparsity.target=0.95")
    assert "sparsity.target was 0.9, is 0.95, and no compression follows that would go by it" in text
    gradual = ["sparsity.schedule=dense 1, sparse 5", "sparsity.gradual={end: 4}"]
    accept(at(3), "sparsity.target=0.95", *gradual, before=gradual)
    assert "no compression follows" in refusal(at(4), "sparsity.target=0.95", *gradual, before=gradual)


def test_how_the_run_began_may_be_left_out():
    began = recipe("checkpoint=somewhere").model_dump(mode="json")
    assert changes(began, recipe()) == []
    assert with_beginning(recipe("resume=auto"), began).checkpoint == "somewhere"
    weights = recipe("model.weights=file.pt", "model.weights_key=ema").model_dump(mode="json")
    model = with_beginning(recipe(), weights).model
    assert (model.weights, model.weights_key) == ("file.pt", "ema")
    assert (
        with_beginning(recipe(), {"checkpoint": {"every": "1ep"}, "model": []}) == recipe()
    )  # of early recipes
