import pytest
import yaml

from sparsity import NM, GlobalMagnitude, UniformMagnitude
from tests.trainer.runs import refusal, starts
from trainer.config.durations import duration_steps
from trainer.config.load import load_config
from trainer.config.recipes import RECIPES, dump_recipe, find_recipe, read_recipe, recipe_names

QUICKSTART = "quickstart"


# Ten times the one before, eight times over: a short text, and an endless message about it
BOMB = "a0: &a0 [1]\n" + "".join(f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 10)}]\n" for n in range(8))


@pytest.mark.parametrize("recipe", recipe_names())
def test_every_recipe_loads_and_says_what_it_should_reach(recipe):
    assert load_config(recipe, starts(recipe)).epochs > 0
    header = [line for line in find_recipe(recipe).read_text().splitlines() if line.startswith("#")]
    for word in ("Paper:", "Ours:", "Hardware:", "Command:"):
        assert any(word in line for line in header), word


def test_overrides_reach_any_field():
    config = load_config(
        QUICKSTART,
        [
            "optimizer.lr=1e-4",
            "model.arguments.width=4",
            "sparsity.exclude=[fc, '*.downsample.0']",
            "data.root=/x",
        ],
    )
    assert config.optimizer.lr == 1e-4
    assert config.model.arguments == {"depth": 8, "width": 4}
    assert config.sparsity.exclude == ["fc", "*.downsample.0"]
    assert config.name == "quickstart"


def test_resolved_configuration_loads_again(tmp_path):
    config = load_config(QUICKSTART, ["lr.kind=step", "lr.milestones=[3, 5]", "sparsity.pattern=uniform"])
    path = tmp_path / "resolved.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert load_config(str(path)) == config


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "optimizer.lrr=0.1",
            "optimizer.lrr: unknown key; did you mean optimizer.lr? allowed here: name, lr, mom",
        ),
        ("optimiser={}", "optimiser: unknown key; did you mean optimizer?"),
        ("epochs=twelve", "epochs: should be a valid integer, not 'twelve'"),
        ("epochs='12'", "epochs: should be a valid integer, not '12'"),
        ("seed=1.5", "seed: should be a valid integer, not 1.5"),
        ("data.flip=1", "data.flip: should be a valid boolean, not 1"),
        ("optimizer.lr=0", "optimizer.lr: should be greater than 0, not 0"),
        ("optimizer.lr=.nan", "optimizer.lr: should be"),
        ("optimizer={}", "optimizer.lr: missing; base learning rate"),
        (
            "data.name=imagenot",
            "data.name: no data set 'imagenot'; did you mean imagenet? one of fashion_mnist, mnist, "
            "cifar10, cifar100",
        ),
        (
            "engine.compile=maybe",
            "engine.compile: should be a valid boolean, not 'maybe' or should be 'auto'",
        ),
        (
            "engine.zero_stage=3",
            "engine.zero_stage: ZeRO stage 3 is not supported with masks yet; use 0, 1 or 2",
        ),
        (
            "save.every=5",
            "save.every: 5 is not a duration; write a number of epochs or steps: 1ep, 500st",
        ),
        ("sparsity.target=1.0", "sparsity.target: should be less than 1, not 1.0"),
        ("sparsity.target=null", "sparsity: pattern global needs a target"),
        ("sparsity.pattern=2:4", "sparsity: pattern 2:4 has its sparsity in itself; leave target out"),
        (
            "sparsity.pattern=magnitude",
            "unknown pattern 'magnitude'; global, uniform, random, N:M such as 2:4, or 2:4 transposable",
        ),
        ("sparsity.schedule=dense 2; sparse 10", "unexpected ';'"),
        ("sparsity.schedule=dense 2, sparse 9", "fills 11 epochs, but epochs is 14"),
        ("lr.warmup_epochs=14", "lr.warmup_epochs is 14, not below epochs, 14"),
        ("lr.kind=step", "lr: milestones belong to kind: step, which needs them"),
        ("engine.accumulation_steps=3", "data.batch_size 64 does not divide by engine.accumulation_steps 3"),
        (
            "data.rand_ops=1",
            "data: rand_ops are RandAugment's, and augment is none: use data.augment=rand, or",
        ),
        (
            "data.augment=randaugment",
            "should be 'none', 'trivial' or 'rand', not 'randaugment'; did you mean",
        ),
        ("data.random_labels=5", "data: random_labels go without augmentation: flip: false, crop_padding: 0"),
        ("optimizer.momentum=0", "nesterov needs a momentum above 0"),
        ("name=../up", "name: "),
        ("epochs.more=1", "'epochs' holds 14, which has no keys below it"),
        ("epochs", "'epochs' is not an override: write key=value"),
        ("epochs=[1", "the value of 'epochs=[1' cannot be read"),
        ("seed=1__0", "seed: should be a valid integer, not '1__0'"),
        ("seed=36893488147419103232", "seed: should be less than or equal to"),
        ("data.root={{ROOT}}", "cannot be read"),
        ("seed=!!int x", "cannot be read"),
        ("epochs=2026-13-45", "epochs: should be a valid integer, not '2026-13-45'"),
        ("model.arguments.num_classes=5", "model.arguments: num_classes follows from the rest of the recipe"),
        # beside unions, of which pydantic names each member
        ("mnist=1", "mnist: unknown key"),
        ("int=3", "int: unknown key"),
        ("data.imagenet=1", "data.imagenet: unknown key"),
        ("sparsity.mnist=1", "sparsity.mnist: unknown key"),
        ("lr.float=2", "lr.float: unknown key"),
        ("checkpoint=", "'checkpoint=' gives no value; for none write checkpoint=null"),
        ("data={batch_size: 3}", "data.name: missing; one of fashion_mnist"),
        ("data=3", "data: "),
        ("sparsity.gradual={}", "sparsity.gradual.end: missing"),
        ("sparsity.gradual={start: 1}", "sparsity.gradual.start: unknown key"),
        ("data.image_size=!!timestamp x", "the value of 'data.image_size=!!timestamp x' cannot be read"),
    ],
)
def test_mistakes_are_named_with_what_is_allowed(override, expected):
    assert expected in refusal(override)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["data.decoder_engine_load=1.5"], "data.decoder_engine_load: should be less than or equal to 1"),
        (["data.decoder_engine_load=-0.1"], "data.decoder_engine_load: should be greater than or equal to 0"),
        (["data.decoder_width_hint=-1"], "data.decoder_width_hint: should be greater than or equal to 0"),
        (
            ["data.decoder_width_hint=6000"],
            "data: decoder_width_hint 6000 and decoder_height_hint 0 go together: give both, or neither",
        ),
    ],
)
def test_mistakes_about_the_decoder_are_named(overrides, expected):
    assert expected in refusal(*overrides, recipe="imagenet/resnet50_90")


def test_all_mistakes_are_told_at_once():
    message = refusal("optimizer.lrr=0.1", "epochs=x", "data.batch_sise=3")
    assert message.count("\n") == 3
    assert "quickstart.yaml" in message


def test_unknown_recipes_name_the_nearest():
    assert "no recipe 'quickstrat'" in refusal(recipe="quickstrat")
    assert "did you mean 'quickstart'?" in refusal(recipe="quickstrat")
    assert "no recipe 'xxx" in refusal(recipe="x" * 300)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("epochs: 1\nepochs: 2\n", "key 'epochs' is given twice"),
        ("- 1\n", "a recipe is a mapping of keys to values, this is a list"),
        ("a: [1\n", "line 2"),
        ("seed: &a [*a]\n", "its aliases stand for more than 100,000 values"),
        (BOMB, "its aliases stand for more than 100,000 values"),
    ],
)
def test_files_that_are_no_recipes(tmp_path, text, expected):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    message = refusal(recipe=str(path))
    assert expected in message
    assert str(path) in message


def test_recipes_build_on_a_base(tmp_path):
    (tmp_path / "_base.yaml").write_text((RECIPES / "quickstart.yaml").read_text())
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("base: _base.yaml\nsparsity: {target: 0.5}\noptimizer: {lr: 0.2}\n")
    mine, base = load_config(str(recipe)), load_config(QUICKSTART)
    assert mine.name == "mine"
    assert mine.sparsity == base.sparsity.model_copy(update={"target": 0.5})
    assert mine.optimizer == base.optimizer.model_copy(update={"lr": 0.2})
    (tmp_path / "_base.yaml").write_text("base: mine.yaml\n")
    assert "leads back to itself" in refusal(recipe=str(recipe))
    recipe.write_text("base: nothing.yaml\n")
    assert "base 'nothing.yaml' is neither a file beside it nor a name" in refusal(recipe=str(recipe))


def test_a_base_may_be_a_packaged_recipe(tmp_path):
    recipe = tmp_path / "imagenet" / "resnet50_90.yaml"
    recipe.parent.mkdir()
    for base in ("imagenet/resnet50_90", "imagenet/resnet50_90.yaml"):
        recipe.write_text(f"base: {base}\nsparsity: {{target: 0.85}}\n")
        mine, packaged = load_config(str(recipe)), load_config("imagenet/resnet50_90")
        assert mine.sparsity.target == 0.85
        assert mine.optimizer == packaged.optimizer
    recipe.write_text("base: resnet50_90.yaml\n")
    assert "leads back to itself" in refusal(recipe=str(recipe))
    recipe.write_text("base: imagenet/resnet50_09\n")
    assert "did you mean 'imagenet/resnet50_" in refusal(recipe=str(recipe))


@pytest.mark.parametrize("recipe", ["finetune", "imagefolder/resnet18_80"])
def test_ones_own_folder_has_to_be_named(recipe):
    assert "data: name the folder of your images, data.root=FOLDER" in refusal(recipe=recipe)
    config = load_config(recipe, ["data.root=flowers"])
    assert (config.data.root, config.data.val_share) == ("flowers", 0.2)
    packed = refusal("data.root=x", "data.format=webdataset", recipe=recipe)
    assert "val_share splits folders of images" in packed


def test_yaml_without_its_traps(tmp_path):
    path = tmp_path / "values.yaml"
    path.write_text(
        "{a: 1e-4, b: 2:4, c: 010, d: off, e: true, f: -.5, g: 1_000, h: 5e3, i: null, j: 3, k: 1.}"
    )
    assert read_recipe(path) == {
        "a": 1e-4, "b": "2:4", "c": 10, "d": "off", "e": True, "f": -0.5,
        "g": 1000, "h": 5000.0, "i": None, "j": 3, "k": 1.0,
    }  # fmt: skip
    assert isinstance(read_recipe(path)["h"], float)


def test_patterns_are_built_as_configured():
    def pattern(*overrides):
        return load_config(QUICKSTART, overrides).sparsity.build_pattern()

    assert pattern() == GlobalMagnitude(0.9)
    assert pattern("sparsity.pattern=uniform", "sparsity.rule=original") == UniformMagnitude(0.9, "original")
    assert pattern("sparsity.pattern=2:4", "sparsity.target=null") == NM(2, 4)


def test_durations():
    assert duration_steps("3ep", 100) == 300
    assert duration_steps("500st", 100) == 500


def test_recipes_are_found_by_name_and_path(tmp_path, monkeypatch):
    assert find_recipe(QUICKSTART) == RECIPES / "quickstart.yaml"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text((RECIPES / "quickstart.yaml").read_text())
    assert load_config("mine.yaml").name == "mine"


@pytest.mark.parametrize("recipe", recipe_names())
def test_a_written_configuration_is_the_same_when_read_again(recipe, tmp_path):
    odd = ["run_root='08'", "resume='1e5'", "model.arguments={x: '12e03', y: 'no', z: '2:4'}"]
    config = load_config(recipe, [*starts(recipe), *odd])
    path = tmp_path / "config.yaml"
    path.write_text(dump_recipe(config.model_dump(mode="json")))
    assert load_config(str(path)) == config
