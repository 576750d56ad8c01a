"""Whole runs in this process: a real DeepSpeed engine, real DALI, real files."""

import dataclasses
import json
import math
import shutil
import statistics
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data.datasets.cifar import CIFAR10
from sparsity.layers import MaskedConv2d
from tests.data.datasets.test_cifar import write_python
from tests.slow import slow
from tests.trainer.runs import (
    NUM_STEPS,
    StopAfter,
    assert_equal_states,
    build,
    final_state,
    fit_and_close,
    newest_run,
    records,
    run_here,
    tiny,
)
from trainer.checkpoints import checkpoint
from trainer.checkpoints.saved_model import load_model
from trainer.cli.main import main as acdc_command
from trainer.config.load import load_config
from trainer.distributed.signals import StopRequest
from trainer.errors import Stopped
from trainer.monitor.screen import closing_lines
from trainer.summary import speed
from trainer.train import main

pytestmark = pytest.mark.usefixtures("needs_runs")


@pytest.fixture(scope="module")
def finished(tiny_data, tmp_path_factory) -> Path:
    return run_here(tiny_data, tmp_path_factory.mktemp("runs"))


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
    assert environment["packages"]["torch"] == torch.__version__
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


@pytest.mark.parametrize("stop_at", [13, *slow(7, 10, 20, 44, 50)])
def test_resumed_anywhere_equals_uninterrupted(finished, tiny_data, tmp_path, stop_at):
    """Within and at the end of dense and sparse epochs; what follows is the same bit for bit."""
    stopped = fit_and_close(build(tiny(tiny_data, tmp_path)[1:]), stop_at)
    assert f"stopped at step {stop_at}; a checkpoint is saved. Go on with resume=" in str(stopped)
    assert stopped.exit_code == 143
    run = newest_run(tmp_path)
    assert main(tiny(tiny_data, tmp_path, "resume=auto")) == 0
    assert newest_run(tmp_path) == run
    assert_equal_states(final_state(run), final_state(finished))
    assert losses(run) == losses(finished)
    assert pictures(run) == pictures(finished)


def pictures(run):
    """TensorBoard's pictures, texts and phases, each with its steps."""
    events = EventAccumulator(str(run / "tb"), {"images": 0, "tensors": 0, "scalars": 0}).Reload()
    images = {tag: [each.step for each in events.Images(tag)] for tag in events.Tags()["images"]}
    texts = {tag: [each.step for each in events.Tensors(tag)] for tag in events.Tags()["tensors"]}
    return images, texts, [(each.step, each.value) for each in events.Scalars("phase/sparse")]


def test_tensorboard_has_pictures_once_and_phases_at_both_ends(finished):
    images, texts, phases = pictures(finished)
    assert images == {"data/first_batch": [0], "sparsity/kept_by_layer": [20, 40, 60]}
    assert texts["test/most_confused/text_summary"] == [NUM_STEPS + 1]
    assert {"recipe/text_summary", "schedule/text_summary", "environment/text_summary"} <= texts.keys()
    ends = {step: value for step, value in phases if step % 10 < 2}
    begins = {10 * i + 1: i % 2 for i in range(6)}
    assert ends == begins | {10 * i + 10: i % 2 for i in range(6)}


def losses(run):
    return [
        (each["kind"], each["step"], each.get("loss", each.get("train_loss")), each.get("val_loss"))
        for each in records(run, None)
    ]


class StopsWhile:
    """A loader that has a signal come while its batches are gone through, in one epoch."""

    def __init__(self, loader, trainer, epoch):
        self.loader, self.trainer, self.at = loader, trainer, epoch

    def epoch(self, epoch, start=0):
        for number, batch in enumerate(self.loader.epoch(epoch, start)):
            if number == 0 and epoch == self.at:
                self.trainer.stop_request._receive(15, None)
            yield batch


@pytest.mark.parametrize("epoch", [2, *slow(1, 5)])
def test_a_signal_in_an_evaluation_saves_at_once(finished, tiny_data, tmp_path, epoch):
    trainer = build(tiny(tiny_data, tmp_path)[1:])
    trainer.loaders = dataclasses.replace(
        trainer.loaders, test=StopsWhile(trainer.loaders.test, trainer, epoch)
    )
    step = 10 * (epoch + 1)
    with pytest.raises(Stopped, match=f"stopped at step {step}; a checkpoint is saved"):
        trainer.fit()
    trainer.close()
    run = newest_run(tmp_path)
    assert [record["epoch"] for record in records(run)] == list(range(epoch))
    assert main(tiny(tiny_data, tmp_path, "resume=auto")) == 0
    assert newest_run(tmp_path) == run
    assert_equal_states(final_state(run), final_state(finished))
    assert losses(run) == losses(finished)


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


def test_resuming_passes_over_a_damaged_checkpoint(finished, tiny_data, tmp_path):
    run = shutil.copytree(finished, tmp_path / "quickstart" / finished.name)
    (checkpoint.step_folder(run / "checkpoints", 60) / checkpoint.STATE).write_bytes(b"half")
    (run / "result.json").unlink()
    assert main(tiny(tiny_data, tmp_path, f"resume={run}")) == 0
    assert_equal_states(final_state(run), final_state(finished))


def test_a_finished_run_is_left_alone(finished, tiny_data, tmp_path, capsys):
    """Naming it says that it is finished and changes nothing; resume=auto starts a new run."""
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.name != ".lock"}
    assert main(tiny(tiny_data, finished.parent.parent, f"resume={finished}")) == 0
    assert f"{finished} is finished: its figures are in " in capsys.readouterr().err
    after = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    assert {path: time for path, time in after.items() if path in before and time != before[path]} == {}
    shutil.copytree(finished, tmp_path / "quickstart" / finished.name)
    dense = ["epochs=1", "sparsity.schedule=dense 1", "lr.warmup_epochs=0"]
    assert main(tiny(tiny_data, tmp_path, "resume=auto", *dense)) == 0
    assert len(list((tmp_path / "quickstart").iterdir())) == 2


@pytest.mark.parametrize("lost", [[], ["metrics.jsonl", "report.html"]])
def test_a_finished_training_without_its_result_gets_one(lost, finished, tiny_data, tmp_path):
    """Killed between the last checkpoint and result.json. Without its records it has no report."""
    run = shutil.copytree(finished, tmp_path / "quickstart" / finished.name)
    result = json.loads((run / "result.json").read_text())
    for name in ("result.json", *lost):
        (run / name).unlink()
    assert main(tiny(tiny_data, tmp_path, "resume=auto")) == 0
    assert (run / "report.html").exists() == (not lost)
    again = json.loads((run / "result.json").read_text())
    assert {key: again[key] for key in ("dense_twin", "sparse", "flops")} == {
        key: result[key] for key in ("dense_twin", "sparse", "flops")
    }
    assert pictures(run) == pictures(finished)


@pytest.mark.slow
def test_resuming_from_an_earlier_checkpoint_sets_the_later_ones_aside(tiny_data, tmp_path):
    """A finished run, gone on with from step 30 and stopped at 35: 35 is what a further resume finds."""
    run = run_here(tiny_data, tmp_path, "save.keep=4")
    state = final_state(run)
    point = checkpoint.step_folder(run / "checkpoints", 30)
    fit_and_close(build(tiny(tiny_data, tmp_path, f"resume={point}", "save.keep=4")[1:]), stop=35)
    steps = [path.name for path in checkpoint.training_checkpoints(run / "checkpoints")]
    assert steps[-2:] == ["step-000000030", "step-000000035"]
    assert not (run / "result.json").exists()
    assert (run / "checkpoints" / "superseded-step-000000060").is_dir()
    assert main(tiny(tiny_data, tmp_path, "resume=auto", "save.keep=4")) == 0
    assert newest_run(tmp_path) == run
    assert_equal_states(final_state(run), state)


@pytest.mark.slow
def test_a_run_in_progress_is_not_resumed_by_a_second_process(tiny_data, tmp_path, capsys):
    trainer = build(tiny(tiny_data, tmp_path)[1:])
    trainer.acdc.before_step = StopAfter(trainer, 11)
    with pytest.raises(Stopped):
        trainer.fit()
    run = newest_run(tmp_path)  # not closed: its lock is held
    assert main(tiny(tiny_data, tmp_path, f"resume={run}")) == 2
    assert "another process is training in it" in capsys.readouterr().err
    assert main(tiny(tiny_data, tmp_path, "resume=auto")) == 2
    assert f"resume auto: another process is training in {run}" in capsys.readouterr().err
    assert len(list((tmp_path / "quickstart").iterdir())) == 1
    trainer.close()
    assert main(tiny(tiny_data, tmp_path, "resume=auto")) == 0
    assert (run / "result.json").exists()


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
    ("overrides", "expected"),
    [
        (["data.batch_size=16"], "another stream of training data: global_batch was 32, is 16"),
        (["seed=9"], "another stream of training data: seed was 1, is 9"),
        (
            ["model.arguments.width=16"],
            "another model: conv1.weight is (8, 1, 3, 3) in the checkpoint, (16, 1, 3, 3)",
        ),
        (
            ["sparsity.exclude=[fc]"],
            "another model: fc.mask is (10, 32) in the checkpoint, missing in the recipe",
        ),
        (["sparsity.schedule=sparse 1, dense 5"], "saved in a sparse phase at step 60"),
    ],
)
def test_resuming_into_something_else_is_refused(finished, overrides, expected, tiny_data, tmp_path, capsys):
    before = sorted(path.stat().st_mtime_ns for path in finished.rglob("*.pt"))
    assert main(tiny(tiny_data, tmp_path, f"resume={finished}", *overrides)) == 2
    assert expected in capsys.readouterr().err
    assert sorted(path.stat().st_mtime_ns for path in finished.rglob("*.pt")) == before


def test_a_checkpoint_that_is_none(tiny_data, tmp_path, capsys):
    fake = tmp_path / "step-000000001"
    fake.mkdir()
    (fake / "manifest.json").write_text("not json")
    assert main(tiny(tiny_data, tmp_path, f"resume={fake}")) == 2
    assert f"{fake} is not a checkpoint" in capsys.readouterr().err
    assert acdc_command(["eval", str(fake)]) == 2
    assert f"{fake} is not a checkpoint" in capsys.readouterr().err
    checkpoint.save(fake, {checkpoint.MODEL: {}}, {"model": {}})
    assert acdc_command(["eval", str(fake)]) == 2
    assert f"{fake} does not say which model it holds" in capsys.readouterr().err


def test_a_checkpoint_in_a_folder_that_is_none(finished, tiny_data, tmp_path, capsys):
    run = shutil.copytree(finished, tmp_path / "quickstart" / finished.name)
    (run / "result.json").unlink()
    shutil.rmtree(run / "tb")
    (run / "tb").write_text("a file where TensorBoard wants a folder")
    assert main(tiny(tiny_data, tmp_path, f"resume={run}")) == 2
    assert f"error: run folder {run}: " in capsys.readouterr().err


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


@pytest.mark.slow
def test_divergence_of_a_resumed_run_names_where_it_came_from(tiny_data, tmp_path, capsys):
    arguments = ["lr.kind=constant", "lr.warmup_epochs=0"]
    first = run_here(tiny_data, tmp_path, *arguments, "save.every=20st", "save.keep=9")
    point = checkpoint.step_folder(first / "checkpoints", 20)
    capsys.readouterr()
    assert main(tiny(tiny_data, tmp_path, *arguments, f"resume={point}", "optimizer.lr=1e30")) == 4
    error = capsys.readouterr().err
    assert f"the last good checkpoint is {point}" in error
    assert "optimizer.lr=1e+30" in error


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


def test_a_second_interrupt_ends_at_once():
    import os
    import signal

    with StopRequest() as request:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.number == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
