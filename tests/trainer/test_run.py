"""Whole runs in this process: a real DeepSpeed engine, real DALI, real files."""

import json
import math
import statistics
from importlib import metadata
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data.datasets.cifar import CIFAR10
from sparsity.layers import MaskedConv2d
from tests.data.datasets.test_cifar import write_python
from tests.trainer.runs import NUM_STEPS, final_state, newest_run, records, run_here, tiny
from trainer.checkpoints import checkpoint
from trainer.checkpoints.saved_model import load_model
from trainer.cli.main import main as acdc_command
from trainer.config.load import load_config
from trainer.monitor.screen import closing_lines
from trainer.summary import speed
from trainer.train import main

pytestmark = pytest.mark.usefixtures("needs_runs")


def test_the_pair_and_its_figures(finished):
    result = json.loads((finished / "result.json").read_text())
    dense, sparse = result["dense_twin"], result["sparse"]
    assert (dense["sparsity"], dense["epoch"]) == (0, 4)
    assert sparse["epoch"] == 5
    assert sparse["num_kept"] == sparse["num_weights"] - round(0.9 * sparse["num_weights"])
    for row in (dense, sparse):
        assert row["num_images"] == 150
        assert 0 <= row["top1"] <= row["top5"] <= 100
    flops = result["flops"]
    assert flops["inference_ratio"] == sparse["inference_flops"] / dense["inference_flops"] < 0.5
    assert 0.5 < flops["training_ratio"] < 0.75  # half of the epochs are sparse
    assert result["seconds"] > 0

    for key, row in (("dense_twin", dense), ("sparse", sparse)):
        model, info = load_model(finished / "checkpoints" / key)
        assert info["result"] == row
        assert not any(isinstance(module, MaskedConv2d) for module in model.modules())
        weights = torch.cat([p.flatten() for p in model.parameters() if p.dim() > 1])
        assert int((weights == 0).sum()) == row["num_weights"] - row["num_kept"]


def test_metrics_and_tensorboard_tell_the_same(finished):
    epochs = records(finished)
    num_weights = json.loads((finished / "result.json").read_text())["dense_twin"]["num_weights"]
    assert [record["phase"] for record in epochs] == ["dense", "sparse"] * 3
    assert [record["step"] for record in epochs] == list(range(10, NUM_STEPS + 1, 10))
    assert [record["mask_difference"] is not None for record in epochs] == [
        False,
        False,
        False,
        True,
        False,
        True,
    ]
    for before, record in ((epochs[1], epochs[3]), (epochs[3], epochs[5])):
        num_kept = [round(num_weights * (1 - each["sparsity"])) for each in (before, record)]
        assert num_kept == [record["mask_kept"] + record[f"mask_{rest}"] for rest in ("dropped", "regrown")]
    assert "mask_regrown" not in epochs[1]  # the first compression changes no mask
    assert all(0 <= record["data_wait"] <= 1 and record["images_per_second"] > 0 for record in epochs)
    assert len(records(finished, None)) == 6 + 6 * 2  # every epoch logs at steps 4 and 8

    events = EventAccumulator(str(finished / "tb")).Reload()
    tags = set(events.Tags()["scalars"])
    for tag, key in (
        ("train/loss_epoch", "train_loss"),
        ("test/top1", "val_top1"),
        ("test/top5", "val_top5"),
        ("sparsity/overall", "sparsity"),
        ("throughput/images_per_second", "images_per_second"),
        ("throughput/data_wait", "data_wait"),
        ("optimizer/lr", "lr"),
    ):
        logged = {event.step: event.value for event in events.Scalars(tag)}
        for record in epochs:
            assert logged[record["step"]] == pytest.approx(record[key], rel=1e-6, abs=1e-6)
    assert {"train/loss", "phase/sparse", "sparsity/mask_regrown", "sparsity/layer/layer1.0.conv1"} <= tags


def test_the_run_folder_says_what_was_run(finished):
    assert load_config(str(finished / "config.yaml")) == load_config("quickstart", tiny_overrides(finished))
    settings = json.loads((finished / "deepspeed.json").read_text())
    assert settings["train_batch_size"] == 32
    assert settings["gradient_clipping"] == 0  # DeepSpeed's default clips
    environment = json.loads((finished / "env.json").read_text())
    assert environment["packages"]["torch"] == metadata.version("torch")  # torch's own may add its build
    assert "<svg" in (finished / "report.html").read_text()


def tiny_overrides(run: Path) -> list[str]:
    root = load_config(str(run / "config.yaml")).data.root
    return tiny(Path(str(root)), run.parent.parent)[1:]


def test_eval_finds_the_accuracies_again(finished, capsys):
    result = json.loads((finished / "result.json").read_text())
    assert acdc_command(["eval", str(finished)]) == 0
    lines = capsys.readouterr().out.splitlines()
    for key in ("dense_twin", "sparse"):
        figures = next(line for line in lines if key in line).replace("│", " ").split()
        assert figures[1] == f"{result[key]['top1']:.2f}"
        assert float(figures[3]) == pytest.approx(result[key]["loss"], abs=2e-4)
    last = checkpoint.step_folder(finished / "checkpoints", NUM_STEPS)
    for options in ([], ["--fast"]):
        assert acdc_command(["eval", str(last), *options]) == 0
        assert f"{result['sparse']['top1']:.2f}" in capsys.readouterr().out


def test_a_run_says_how_fast_its_phases_were(finished):
    rates = [record["images_per_second"] for record in records(finished)]
    result = json.loads((finished / "result.json").read_text())
    dense, compressed = statistics.median(rates[2:5:2]), statistics.median(rates[3:6:2])
    share = (3 + 3 * dense / compressed) / 6
    assert result["speed"] == pytest.approx(
        {"dense_images_per_second": dense, "compressed_images_per_second": compressed, "time_of_dense": share}
    )
    (line,) = (line for line in closing_lines(result) if line.startswith("speed "))
    assert line.endswith(f"training took {share:.2f} of a dense run's time")
    page = (finished / "report.html").read_text()
    assert f">{dense:,.0f}<" in page
    assert f"took {share:.2f} of as many dense epochs" in page


@pytest.mark.parametrize(
    ("phases", "expected"),
    [
        # the first of each kind compiles, and a resumed epoch of one more step has no rate
        ([("dense", 1), ("sparse", 1), ("dense", 8), ("sparse", 10), ("dense", 0)], (8, 10, 0.92)),
        ([("dense", 1), ("dense", 8), ("sparse", 10)], None),
        ([("sparse", 1), ("sparse", 10)], None),
    ],
)
def test_no_speed_without_both_phases(phases, expected):
    epochs = [{"kind": "epoch", "phase": kind, "images_per_second": rate} for kind, rate in phases]
    found = speed([{"kind": "step"}, *epochs])
    assert (found and tuple(found.values())) == (expected and pytest.approx(expected))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["data.root=/nowhere"], "data: no Fashion-MNIST "),
        (["data.batch_size=500"], "320 training images are fewer than one batch of 500"),
        (["sparsity.exclude=[layer9.*]"], "sparsity: exclude pattern 'layer9.*' matches no convolution"),
        (
            ["sparsity.pattern=2:3", "sparsity.target=null"],
            "2:3 sparsity: layer 'layer2.0.downsample.0' has 128 weights",
        ),
        (["model.name=resnet21"], "model: unknown model 'resnet21'; did you mean"),
        (["model.arguments.depth=9"], "model: depth 9: these ResNets have 6 n + 2 layers"),
        (["model.arguments.widht=4"], "unexpected keyword argument 'widht'"),
        (
            ["model.arguments.in_channels=3"],
            "model.arguments: in_channels follows from the rest of the recipe",
        ),
        (["model.arguments.width=0"], "model: width 0"),
        (["model.arguments.width=4"], "layer2.0.downsample.0: on a CPU, torch computes wrong gradients"),
        (["sparsity.gradual.end=40"], "sparsity: masks that change within a phase need one sparse phase"),
        (
            ["model.name=torchvision:resnet18", "model.arguments={}"],
            "model: torchvision's models take 3 input",
        ),
        (["run_root=/dev/null/runs"], "run_root /dev/null/runs: the run folder cannot be written"),
        (["resume=/nowhere"], "resume /nowhere: no whole checkpoint in /nowhere/checkpoints"),
        (["engine.deepspeed=/nowhere.json"], "engine.deepspeed /nowhere.json: "),
        (["optimizer.lrr=1"], "optimizer.lrr: unknown key; did you mean optimizer.lr?"),
    ],
)
def test_mistakes_end_with_code_2_and_one_message(overrides, expected, tiny_data, tmp_path, capsys):
    assert main(tiny(tiny_data, tmp_path, *overrides)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert expected in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    "overrides",
    [
        ["optimizer.lr=1e12", "log.every=9st", "save.every=1st"],  # saved between two looks at the loss
        [
            "optimizer.lr=1e30",
            "data.batch_size=320",
            "epochs=1",
            "sparsity.schedule=dense 1",
        ],  # by the last step
        ["optimizer.lr=1e30", "save.every=2ep"],
    ],
)
def test_divergence_ends_with_code_4_and_only_good_checkpoints_are_kept(
    overrides, tiny_data, tmp_path, capsys
):
    constant = ["lr.kind=constant", "lr.warmup_epochs=0"]
    assert main(tiny(tiny_data, tmp_path, *constant, *overrides)) == 4
    error = capsys.readouterr().err
    assert "error: training diverged: " in error
    run = newest_run(tmp_path)
    kept = checkpoint.training_checkpoints(run / "checkpoints")
    for path in kept:
        model = checkpoint.read(path, checkpoint.STATE)["model"]
        assert all(value.isfinite().all() for value in model.values() if value.is_floating_point())
    assert (f"the last good checkpoint is {kept[-1]}" if kept else "no checkpoint was saved before") in error
    assert not (run / "checkpoints" / "dense_twin").exists()
    for line in (run / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_users_own_deepspeed_file_is_merged_and_conflicts_are_refused(tiny_data, tmp_path, capsys):
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps({"gradient_clipping": 1.0, "zero_optimization": {"stage": 0}}))
    short = ["epochs=2", "sparsity.schedule=dense 1, sparse 1"]
    run = run_here(tiny_data, tmp_path / "runs", f"engine.deepspeed={path}", *short)
    assert json.loads((run / "deepspeed.json").read_text())["gradient_clipping"] == 1.0
    for theirs, expected in (
        (
            {"zero_optimization": {"stage": 2}},
            "zero_optimization.stage is 2 there, but the recipe makes it 0",
        ),
        (
            {"scheduler": {"type": "WarmupLR"}, "optimizer": {}},
            "optimizer and scheduler belong to the recipe",
        ),
        ({"gradient_clipping": "abc"}, f"engine.deepspeed {path}: "),
        ({"zero_optimization": {"stage": 0, "foo": 1}}, f"engine.deepspeed {path}: "),
        ([1], "a DeepSpeed configuration is a JSON object"),
    ):
        path.write_text(json.dumps(theirs))
        assert main(tiny(tiny_data, tmp_path / "runs", f"engine.deepspeed={path}", *short)) == 2
        error = capsys.readouterr().err
        assert expected in error
        assert "Traceback" not in error


@pytest.mark.slow
def test_accumulated_batches_make_the_same_steps(finished, tiny_data, tmp_path):
    """Other BatchNorm batches, so other numbers; the same switches, sparsity and order of images."""
    run = run_here(tiny_data, tmp_path, "engine.accumulation_steps=2")
    ours, other = (json.loads((folder / "result.json").read_text()) for folder in (run, finished))
    assert ours["sparse"]["num_kept"] == other["sparse"]["num_kept"]
    assert math.isclose(ours["flops"]["training_dense"], other["flops"]["training_dense"])
    state = final_state(run)
    assert state["acdc"]["step"] == NUM_STEPS


def test_memorisation_is_watched_in_both_ways(tiny_data, tmp_path):
    plain = ["data.flip=false", "data.crop_padding=0", "data.random_labels=100"]
    run = run_here(tiny_data, tmp_path, *plain, "epochs=2", "sparsity.schedule=dense 1, sparse 1")
    epochs = records(run)
    assert len(epochs) == 2
    for record in epochs:
        assert 0 <= record["memorised_top1"] <= 100
        assert record["memorised_loss"] != record["memorised_true_loss"]
    events = EventAccumulator(str(run / "tb")).Reload()
    logged = [event.value for event in events.Scalars("memorised/true_labels_top1")]
    assert logged == pytest.approx([record["memorised_true_top1"] for record in epochs])


def test_a_cifar_recipe_runs_from_distributed_files(tmp_path):
    write_python(tmp_path, CIFAR10)  # 100 training and 20 test images of noise
    recipe = ["cifar10/memorisation_90", f"run_root={tmp_path / 'runs'}", f"data.root={tmp_path}"]
    short = ["epochs=2", "sparsity.schedule=dense 1, sparse 1", "lr={kind: constant}", "engine.compile=false"]
    assert (
        main([*recipe, *short, "data.batch_size=20", "data.random_labels=20", "data.eval_batch_size=20"]) == 0
    )
    (run,) = (tmp_path / "runs" / "memorisation_90").iterdir()
    result = json.loads((run / "result.json").read_text())
    assert (result["sparse"]["num_weights"], result["sparse"]["num_kept"]) == (268_336, 26_834)
