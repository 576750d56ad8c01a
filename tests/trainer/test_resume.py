"""Runs that are stopped, left alone, resumed or refused to be."""

import dataclasses
import json
import shutil

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

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
from trainer.cli.main import main as acdc_command
from trainer.distributed.signals import StopRequest
from trainer.errors import Stopped
from trainer.train import main

pytestmark = pytest.mark.usefixtures("needs_runs")


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
