"""Runs that begin where another one stands: the dense twin finished, shared warm-ups, weights alone."""

import json
import os
import shutil
import signal

import pytest
import torch

from tests.slow import slow
from tests.trainer.runs import assert_equal_states, final_state, records, run_here, tiny
from trainer.checkpoints import checkpoint
from trainer.checkpoints.saved_model import load_model
from trainer.train import main

pytestmark = pytest.mark.usefixtures("needs_runs")
DENSE_TO_THE_END = "sparsity.schedule=dense 1, sparse 1, dense 1, sparse 1, dense 2"


@pytest.fixture(scope="module")
def both(tiny_data, tmp_path_factory):
    """AC/DC and its dense branch in one go."""
    return run_here(
        tiny_data, tmp_path_factory.mktemp("runs"), "finetune_dense=true", "save.every=4st", "save.keep=9"
    )


def weights(folder):
    return load_model(folder)[0].state_dict()


def weights_of_branch(run):
    return weights(run / "finetuned_dense" / "checkpoints" / "dense_twin")


def test_the_dense_branch_is_the_run_without_the_last_compression(both, tiny_data, tmp_path):
    branch = both / "finetuned_dense"
    other = run_here(tiny_data, tmp_path, DENSE_TO_THE_END)
    assert_equal_states(weights_of_branch(both), weights(other / "checkpoints" / "dense_twin"))
    result, alone = (json.loads((run / "result.json").read_text()) for run in (both, other))
    row = result["finetuned_dense"]
    assert row == json.loads((branch / "result.json").read_text())["dense_twin"]
    assert row["loss"] == alone["dense_twin"]["loss"]
    assert (row["epoch"], result["dense_twin"]["epoch"], result["sparse"]["epoch"]) == (5, 4, 5)
    assert result["sparse"]["num_kept"] < result["sparse"]["num_weights"] == 19464


def test_a_dense_branch_is_a_recipe_of_its_own_too(both, tiny_data, tmp_path):
    run = run_here(tiny_data, tmp_path, f"checkpoint={both}", "sparsity={schedule: dense 6}")
    assert_equal_states(weights(run / "checkpoints" / "dense_twin"), weights_of_branch(both))
    assert [record["epoch"] for record in records(run)] == [5]


def interrupted(both, tmp_path, step):
    """A copy of the run as it was when its branch had done `step` steps; None: when it had concluded for
    itself."""
    run = shutil.copytree(both, tmp_path / "quickstart" / both.name)
    result = json.loads((run / "result.json").read_text())
    del result["finetuned_dense"]
    (run / "result.json").write_text(json.dumps(result))
    branch = run / "finetuned_dense"
    if step is not None:
        (branch / "result.json").unlink()
        shutil.rmtree(branch / "checkpoints" / "dense_twin")
        for path in checkpoint.training_checkpoints(branch / "checkpoints"):
            if path > checkpoint.step_folder(branch / "checkpoints", step):
                shutil.rmtree(path)
    return run


@pytest.mark.parametrize("step", [None, *slow(50, 56)])
def test_an_interrupted_branch_is_resumed(both, tiny_data, tmp_path, capsys, step):
    run = interrupted(both, tmp_path, step)
    options = ["finetune_dense=true", "save.every=4st", "save.keep=9"]
    assert main(tiny(tiny_data, tmp_path, "resume=auto", *options)) == 0
    assert_equal_states(weights_of_branch(run), weights_of_branch(both))
    row, expected = (
        json.loads((folder / "result.json").read_text())["finetuned_dense"] for folder in (run, both)
    )
    assert row == expected
    capsys.readouterr()
    assert main(tiny(tiny_data, tmp_path, f"resume={run}", *options)) == 0
    assert "is finished" in capsys.readouterr().err


@pytest.mark.slow
def test_another_dense_twin_gets_another_branch(both, tiny_data, tmp_path):
    run = interrupted(both, tmp_path, None)
    point = checkpoint.step_folder(run / "checkpoints", 40)
    assert main(tiny(tiny_data, tmp_path, "finetune_dense=true", "optimizer.lr=0.01", f"resume={point}")) == 0
    ours, before = weights_of_branch(run), weights_of_branch(both)
    assert not torch.equal(ours["fc.weight"], before["fc.weight"])
    assert (run / "superseded-finetuned_dense").is_dir()
    twin, row = (
        json.loads((run / "result.json").read_text())[key] for key in ("dense_twin", "finetuned_dense")
    )
    assert twin["epoch"] == 4
    assert row == json.loads((run / "finetuned_dense" / "result.json").read_text())["dense_twin"]


def stop_at(monkeypatch, path_ends, step):
    """Stand in for a signal during `step` of the run in the folder of that name."""
    from trainer.loop import Trainer

    train_batch = Trainer.train_batch

    def watched(self, batches):
        if self.run_dir.path.name.endswith(path_ends) and self.acdc.step == step:
            self.stop_request.number = 15
        return train_batch(self, batches)

    monkeypatch.setattr(Trainer, "train_batch", watched)


@pytest.mark.parametrize(
    ("where", "step"), [("", 60), pytest.param("finetuned_dense", 53, marks=pytest.mark.slow)]
)
def test_a_signal_before_or_within_the_branch(both, tiny_data, tmp_path, monkeypatch, capsys, where, step):
    with monkeypatch.context() as patch:
        stop_at(patch, where, step)
        assert main(tiny(tiny_data, tmp_path, "finetune_dense=true")) == 128 + 15
    (run,) = (tmp_path / "quickstart").iterdir()
    assert f"Go on with resume={run}\n" in capsys.readouterr().err
    assert (run / "finetuned_dense").exists() == bool(where)
    assert main(tiny(tiny_data, tmp_path, "finetune_dense=true", f"resume={run}")) == 0
    assert_equal_states(weights_of_branch(run), weights_of_branch(both))


def test_a_signal_between_the_last_epoch_and_the_branch(both, tiny_data, tmp_path, monkeypatch, capsys):
    """It comes while the pass over the classes runs; the pair is finished, and the branch waits."""
    from trainer import summary

    count = summary.confusion

    def and_a_signal(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return count(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(summary, "confusion", and_a_signal)
        assert main(tiny(tiny_data, tmp_path, "finetune_dense=true")) == 128 + 15
    (run,) = (tmp_path / "quickstart").iterdir()
    assert f"Go on with resume={run}\n" in capsys.readouterr().err
    assert json.loads((run / "result.json").read_text())["sparse"]
    assert not (run / "finetuned_dense").exists()
    assert main(tiny(tiny_data, tmp_path, "finetune_dense=true", f"resume={run}")) == 0
    assert_equal_states(weights_of_branch(run), weights_of_branch(both))


def test_a_branch_that_can_never_be_is_refused_at_once(both, tiny_data, tmp_path, capsys):
    """From behind the last dense phase there is no dense twin to come."""
    point = both / "checkpoints" / "dense_twin"
    arguments = [f"checkpoint={point}", "sparsity.schedule=dense 2, sparse 2, dense 1, sparse 1"]
    assert main(tiny(tiny_data, tmp_path, "finetune_dense=true", *arguments)) == 2
    assert "behind the last dense phase" in capsys.readouterr().err


def test_resume_does_not_take_another_beginning(both, tiny_data, tmp_path, capsys):
    point = both / "checkpoints" / "dense_twin"
    run = run_here(
        tiny_data, tmp_path, f"checkpoint={point}", "sparsity={schedule: dense 6}", "save.every=4st"
    )
    (run / "result.json").unlink()
    other = checkpoint.step_folder(both / "checkpoints", 60)
    arguments = ["sparsity={schedule: dense 6}", f"checkpoint={other}"]
    assert main(tiny(tiny_data, tmp_path, *arguments, f"resume={run}")) == 2
    assert f"that run began with checkpoint={point}, not with {other}" in capsys.readouterr().err


@pytest.mark.slow
def test_a_shared_warm_up(tiny_data, tmp_path):
    """As the paper's runs without first and last layer: from another run's dense warm-up, with other layers
    and another sparsity. It is the run that a fresh start with that recipe would have been."""
    first = run_here(tiny_data, tmp_path / "a", "save.every=10st", "save.keep=9")
    point = checkpoint.step_folder(first / "checkpoints", 10)
    other = ["sparsity.target=0.5", "sparsity.exclude=[conv1, fc]"]
    branched = run_here(tiny_data, tmp_path / "b", f"checkpoint={point}", *other)
    fresh = run_here(tiny_data, tmp_path / "c", *other)
    a, b = final_state(branched), final_state(fresh)
    for key in ("model", "optimizer", "acdc"):
        assert_equal_states(a[key], b[key], key)


@pytest.mark.slow
def test_a_branch_within_a_sparse_phase_takes_the_masks_along(tiny_data, tmp_path):
    schedule = "sparsity.schedule=dense 1, sparse 5"
    first = run_here(tiny_data, tmp_path / "a", schedule, "save.every=10st", "save.keep=9")
    point = checkpoint.step_folder(first / "checkpoints", 30)
    branched = run_here(tiny_data, tmp_path / "b", schedule, f"checkpoint={point}")
    a, b = final_state(branched), final_state(first)
    for key in ("model", "optimizer"):
        assert_equal_states(a[key], b[key], key)


@pytest.mark.parametrize(
    ("point", "overrides", "expected"),
    [
        ("nowhere", [], "no such folder; name a run folder or a checkpoint in it"),
        ("checkpoints/sparse", [], "holds no state.pt"),
        ("checkpoints/step-000000060", [], "it has 6 epochs behind it, and the schedule has 6"),
        ("checkpoints/dense_twin", ["model.arguments.width=16"], "another model: conv1.weight is (8,"),
        (
            "checkpoints/dense_twin",
            ["sparsity.schedule=dense 1, sparse 5"],
            "epoch 5 lies within a sparse phase, and there is no mask for layer 'conv1'",
        ),
        ("", ["model.weights=x"], "checkpoint brings its weights along"),
    ],
)
def test_what_cannot_be_branched_off_from(both, tiny_data, tmp_path, capsys, point, overrides, expected):
    assert main(tiny(tiny_data, tmp_path, f"checkpoint={both / point}", *overrides)) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert "Traceback" not in error


def test_a_state_from_within_an_epoch_is_no_place_to_branch(tiny_data, tmp_path, capsys):
    short = ["epochs=2", "sparsity.schedule=dense 1, sparse 1"]
    run = run_here(tiny_data, tmp_path, *short, "save.every=4st", "save.keep=9")
    point = checkpoint.step_folder(run / "checkpoints", 4)
    assert main(tiny(tiny_data, tmp_path, *short, f"checkpoint={point}")) == 2
    assert "saved within an epoch, after 4 steps of it" in capsys.readouterr().err


ONE = ["epochs=1", "sparsity={schedule: dense 1}", "optimizer.lr=1e-12", "lr.warmup_epochs=0"]


@pytest.mark.parametrize("form", ["run", *slow("checkpoint", "torch", "nested", "safetensors")])
def test_weights_alone(both, tiny_data, tmp_path, form):
    """A run that starts from weights and hardly learns ends where they were."""
    state = weights(both / "checkpoints" / "sparse")
    path = tmp_path / f"weights.{'safetensors' if form == 'safetensors' else 'pth'}"
    if form == "torch":
        torch.save(state, path)
    elif form == "nested":
        torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}}, path)
    elif form == "safetensors":
        pytest.importorskip("safetensors.torch", reason="safetensors is not installed").save_file(state, path)
    else:
        path = both if form == "run" else both / "checkpoints" / "step-000000060"
    run = run_here(tiny_data, tmp_path / "runs", *ONE, f"model.weights={path}")
    ended = weights(run / "checkpoints" / "dense_twin")
    for name, value in state.items():
        if "running" not in name and "num_batches" not in name:
            assert torch.allclose(ended[name], value, atol=1e-8), name
    zeros = sum(int((value == 0).sum()) for name, value in state.items() if value.dim() > 1)
    assert zeros == 19464 - 1946


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "no such file or folder"),
        (b"no torch file", "no torch file of tensors"),
        ([1, 2], "it holds no state_dict"),
        ({"conv1.weight": torch.zeros(3)}, "they are another model's"),
    ],
)
def test_weights_that_do_not_fit(tiny_data, tmp_path, capsys, content, expected):
    path = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    assert main(tiny(tiny_data, tmp_path, *ONE, f"model.weights={path}")) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert "Traceback" not in error
    assert not list(tmp_path.glob("quickstart/*"))  # nothing was begun


def test_the_dense_branch_needs_something_to_finish(tiny_data, tmp_path, capsys):
    assert main(tiny(tiny_data, tmp_path, "finetune_dense=true", "sparsity={schedule: dense 6}")) == 2
    assert "finetune_dense needs a dense phase with a sparse one after it" in capsys.readouterr().err
    assert not (tmp_path / "quickstart").exists()  # nothing was begun
