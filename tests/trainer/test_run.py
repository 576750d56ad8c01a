"""Whole runs in this process: a real DeepSpeed engine, real DALI, real files."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sparsity.layers import MaskedConv2d
from tests.trainer.runs import NUM_STEPS, assert_equal_states, final_state, newest_run, run_here, tiny
from trainer import checkpoint
from trainer.build import build_trainer
from trainer.cli import main as acdc_command
from trainer.config import load_config
from trainer.errors import Stopped
from trainer.export import load_model
from trainer.ranks import start
from trainer.signals import StopRequest
from trainer.train import main

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
pytest.importorskip("nvidia.dali", reason="DALI is not installed")


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
    records = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    epochs = [record for record in records if record["kind"] == "epoch"]
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
    assert all(0 <= record["data_wait"] <= 1 and record["images_per_second"] > 0 for record in epochs)
    assert len(records) == 6 + 6 * 2  # every epoch logs at steps 4 and 8

    events = EventAccumulator(str(finished / "tb"))
    events.Reload()
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
    assert {"train/loss", "phase/sparse", "sparsity/mask_difference", "sparsity/layer/layer1.0.conv1"} <= tags


def test_the_run_folder_says_what_was_run(finished):
    assert load_config(str(finished / "config.yaml")) == load_config("quickstart", tiny_overrides(finished))
    assert json.loads((finished / "deepspeed.json").read_text())["train_batch_size"] == 32
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
    assert acdc_command(["eval", str(last)]) == 0
    assert f"{result['sparse']['top1']:.2f}" in capsys.readouterr().out


class StopAfter:
    """Stands in for a signal that arrives during step `step`."""

    def __init__(self, trainer, step):
        self.before_step = trainer.acdc.before_step
        self.trainer, self.step = trainer, step

    def __call__(self):
        self.before_step()
        if self.trainer.acdc.step == self.step:
            self.trainer._stop_request.number = 15


@pytest.mark.parametrize("stop_at", [7, 10, 13, 20, 44, 50])
def test_resumed_anywhere_equals_uninterrupted(finished, tiny_data, tmp_path, stop_at):
    """Within and at the end of dense and sparse epochs; what follows is the same bit for bit."""
    trainer = build_trainer(load_config("quickstart", tiny(tiny_data, tmp_path)[1:]), start())
    trainer.acdc.before_step = StopAfter(trainer, stop_at)
    with pytest.raises(
        Stopped, match=f"stopped at step {stop_at}; a checkpoint is saved. Go on with resume="
    ) as stop:
        trainer.fit()
    assert stop.value.exit_code == 143
    trainer.monitor.close()
    run = newest_run(tmp_path)
    assert main(tiny(tiny_data, tmp_path, "resume=auto")) == 0
    assert newest_run(tmp_path) == run
    assert_equal_states(final_state(run), final_state(finished))

    def losses(folder):
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [
            (r["kind"], r["step"], r.get("loss", r.get("train_loss")), r.get("val_loss")) for r in records
        ]

    assert losses(run) == losses(finished)


def test_resuming_passes_over_a_damaged_checkpoint(finished, tiny_data, tmp_path):
    run = tmp_path / "quickstart" / finished.name
    shutil.copytree(finished, run)
    (checkpoint.step_folder(run / "checkpoints", 60) / checkpoint.STATE).write_bytes(b"half")
    (run / "result.json").unlink()
    assert main(tiny(tiny_data, tmp_path, f"resume={run}")) == 0
    assert_equal_states(final_state(run), final_state(finished))


def test_a_finished_run_is_left_alone(finished, tiny_data, tmp_path):
    """resume=auto starts a new run; naming the finished run only shows its result again."""
    before = final_state(finished)
    assert main(tiny(tiny_data, finished.parent.parent, f"resume={finished}")) == 0
    assert_equal_states(final_state(finished), before)
    run = tmp_path / "quickstart" / finished.name
    shutil.copytree(finished, run)
    assert (
        main(
            tiny(
                tiny_data,
                tmp_path,
                "resume=auto",
                "epochs=1",
                "sparsity.schedule=dense 1",
                "lr.warmup_epochs=0",
            )
        )
        == 0
    )
    assert len(list((tmp_path / "quickstart").iterdir())) == 2


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["data.root=/nowhere"], "data: no Fashion-MNIST "),
        (["data.batch_size=500"], "320 training images are fewer than one batch of 500"),
        (["sparsity.exclude=[layer9.*]"], "sparsity: exclude pattern 'layer9.*' matches no convolution"),
        (
            ["sparsity.pattern=2:3", "sparsity.target=null"],
            "2:3 sparsity: layer 'layer2.0.downsample.0' has 32 weights",
        ),
        (["model.name=resnet21"], "model: unknown model 'resnet21'; One of: resnet_cifar, resnet20"),
        (["model.arguments.depth=9"], "model: depth 9: these ResNets have 6 n + 2 layers"),
        (["model.arguments.widht=4"], "unexpected keyword argument 'widht'"),
        (["run_root=/dev/null/runs"], "run_root /dev/null/runs: the run folder cannot be written"),
        (["resume=/nowhere"], "resume /nowhere: no whole training checkpoint in /nowhere/checkpoints"),
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
            ["model.arguments.width=8"],
            "another model: conv1.weight is (4, 1, 3, 3) in the checkpoint, (8, 1, 3, 3)",
        ),
        (
            ["sparsity.exclude=[fc]"],
            "another model: fc.mask is (10, 16) in the checkpoint, missing in the recipe",
        ),
        (["sparsity.schedule=sparse 1, dense 5"], "saved in a sparse phase at step 60"),
    ],
)
def test_resuming_into_something_else_is_refused(finished, overrides, expected, tiny_data, tmp_path, capsys):
    before = sorted(path.stat().st_mtime_ns for path in finished.rglob("*.pt"))
    assert main(tiny(tiny_data, tmp_path, f"resume={finished}", *overrides)) == 2
    assert expected in capsys.readouterr().err
    assert sorted(path.stat().st_mtime_ns for path in finished.rglob("*.pt")) == before


def test_a_checkpoint_that_is_none(finished, tiny_data, tmp_path, capsys):
    fake = tmp_path / "step-000000001"
    fake.mkdir()
    (fake / "manifest.json").write_text("not json")
    assert main(tiny(tiny_data, tmp_path, f"resume={fake}")) == 2
    assert f"{fake} is not a checkpoint" in capsys.readouterr().err
    assert acdc_command(["eval", str(fake)]) == 2
    assert f"{fake} is not a checkpoint" in capsys.readouterr().err


def test_divergence_ends_with_code_4_and_names_the_last_good_checkpoint(tiny_data, tmp_path, capsys):
    """Two good epochs, then a learning rate that blows up."""
    arguments = ["lr.kind=constant", "lr.warmup_epochs=0", "optimizer.momentum=0.9"]
    first = run_here(tiny_data, tmp_path, *arguments, "checkpoint.every=20st", "checkpoint.keep=9")
    kept = checkpoint.step_folder(first / "checkpoints", 20)
    capsys.readouterr()
    assert main(tiny(tiny_data, tmp_path, *arguments, f"resume={kept}", "optimizer.lr=1e30")) == 4
    error = capsys.readouterr().err
    assert "error: training diverged: the loss is " in error
    assert "the last good checkpoint is " in error
    assert "optimizer.lr=1e+30" in error


def test_users_own_deepspeed_file_is_merged_and_conflicts_are_refused(tiny_data, tmp_path, capsys):
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps({"gradient_clipping": 1.0, "zero_optimization": {"stage": 0}}))
    short = ["epochs=2", "sparsity.schedule=dense 1, sparse 1"]
    run = run_here(tiny_data, tmp_path / "runs", f"engine.deepspeed={path}", *short)
    assert json.loads((run / "deepspeed.json").read_text())["gradient_clipping"] == 1.0
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    assert main(tiny(tiny_data, tmp_path / "runs", f"engine.deepspeed={path}", *short)) == 2
    assert "zero_optimization.stage is 2 there, but the recipe makes it 0" in capsys.readouterr().err


def test_accumulated_batches_make_the_same_steps(finished, tiny_data, tmp_path):
    """Other BatchNorm batches, so other numbers; the same switches, sparsity and order of images."""
    run = run_here(tiny_data, tmp_path, "engine.accumulation_steps=2")
    ours, other = (json.loads((folder / "result.json").read_text()) for folder in (run, finished))
    assert ours["sparse"]["num_kept"] == other["sparse"]["num_kept"]
    assert math.isclose(ours["flops"]["training_dense"], other["flops"]["training_dense"])
    state = final_state(run)
    assert state["acdc"]["step"] == NUM_STEPS


def test_bf16_autocast_keeps_fp32_weights(tiny_data, tmp_path):
    run = run_here(tiny_data, tmp_path, "engine.precision=bf16")
    state = final_state(run)
    assert all(value.dtype == torch.float32 for value in state["model"].values() if value.is_floating_point())
    assert json.loads((run / "result.json").read_text())["sparse"]["sparsity"] == pytest.approx(0.9, abs=2e-4)


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
