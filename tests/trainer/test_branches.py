"""Runs that begin where another one stands: the dense twin finished, shared warm-ups, weights alone."""

import json
import shutil

import pytest
import torch

from tests.trainer.runs import assert_equal_states, final_state, run_here, tiny
from trainer import checkpoint
from trainer.export import load_model
from trainer.train import main

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
pytest.importorskip("nvidia.dali", reason="DALI is not installed")
DENSE_TO_THE_END = "sparsity.schedule=dense 1, sparse 1, dense 1, sparse 1, dense 2"


@pytest.fixture(scope="module")
def both(tiny_data, tmp_path_factory):
    """AC/DC and its dense branch in one go."""
    return run_here(tiny_data, tmp_path_factory.mktemp("runs"), "finetune_dense=true", "save.every=10st")


def weights(folder):
    return load_model(folder)[0].state_dict()


def test_the_dense_branch_is_the_run_without_the_last_compression(both, tiny_data, tmp_path):
    branch = both / "finetuned_dense"
    other = run_here(tiny_data, tmp_path, DENSE_TO_THE_END)
    assert_equal_states(
        weights(branch / "checkpoints" / "dense_twin"), weights(other / "checkpoints" / "dense_twin")
    )
    result, alone = (json.loads((run / "result.json").read_text()) for run in (both, other))
    row = result["finetuned_dense"]
    assert row == json.loads((branch / "result.json").read_text())["dense_twin"]
    assert row["loss"] == alone["dense_twin"]["loss"]
    assert (row["epoch"], result["dense_twin"]["epoch"], result["sparse"]["epoch"]) == (5, 4, 5)
    assert result["sparse"]["num_kept"] < result["sparse"]["num_weights"] == 4964


def test_a_dense_branch_is_a_recipe_of_its_own_too(both, tiny_data, tmp_path):
    run = run_here(tiny_data, tmp_path, f"checkpoint={both}", "sparsity={schedule: dense 6}")
    branch = both / "finetuned_dense" / "checkpoints" / "dense_twin"
    assert_equal_states(weights(run / "checkpoints" / "dense_twin"), weights(branch))
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records if record["kind"] == "epoch"] == [5]


def test_an_interrupted_branch_is_resumed(both, tiny_data, tmp_path, capsys):
    run = tmp_path / "quickstart" / both.name
    shutil.copytree(both, run)
    (run / "finetuned_dense" / "result.json").unlink()
    shutil.rmtree(run / "finetuned_dense")
    assert main(tiny(tiny_data, tmp_path, "resume=auto", "finetune_dense=true")) == 0
    capsys.readouterr()
    branches = [folder / "finetuned_dense" / "checkpoints" / "dense_twin" for folder in (run, both)]
    assert_equal_states(*map(weights, branches))
    assert main(tiny(tiny_data, tmp_path, f"resume={run}", "finetune_dense=true")) == 0
    assert "is finished" in capsys.readouterr().err


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
        (
            "checkpoints/dense_twin",
            ["model.arguments.width=8"],
            "another model: conv1.weight is (4,",
        ),
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


def first_loss(run):
    return next(
        record["val_loss"]
        for record in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        if record["kind"] == "epoch"
    )


ONE = ["epochs=1", "sparsity={schedule: dense 1}", "optimizer.lr=1e-12", "lr.warmup_epochs=0"]


@pytest.mark.parametrize("form", ["run", "checkpoint", "torch", "nested", "safetensors"])
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
    assert zeros == 4964 - 496


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
    assert not list(tmp_path.glob("quickstart/*"))


def test_the_dense_branch_needs_something_to_finish(tiny_data, tmp_path, capsys):
    assert main(tiny(tiny_data, tmp_path, "finetune_dense=true", "sparsity={schedule: dense 6}")) == 2
    assert "finetune_dense needs a dense phase with a sparse one after it" in capsys.readouterr().err
    assert not (tmp_path / "quickstart").exists()  # nothing was begun
