"""Two ranks against one, in what comes out: one launch of several runs, and the same runs in this process."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from sparsity.kernels.unstructured.library import find_compiler
from tests.trainer.distributed.rank_results import observe, precision_of
from tests.trainer.distributed.small_net import WHOLE, evaluated_by_hand, small
from tests.trainer.runs import build, execute, final_state, launcher, records
from trainer.checkpoints import checkpoint

pytestmark = pytest.mark.launch

STEP = 5  # of six, in the middle of the second epoch
RUNS = {  # without BatchNorm and dropout, which depend on who computes what; and with both
    "plain0": ["engine.zero_stage=0"],
    "plain1": ["engine.zero_stage=1", "data.batch_size=144"],  # of 320 images, so the third is incomplete
    "accumulated": ["engine.accumulation_steps=2"],
    "whole": [f"model.arguments={WHOLE}"],
    "adamw1": [
        "engine.zero_stage=1",
        "sparsity.schedule=sparse 1, dense 1",
        "optimizer={name: adamw, lr: 0.01, weight_decay: 0.01, clip_norm: 0.5}",
        "optimizer.decay_norms_and_biases=false",
    ],
    "mixed": ["mixing={mixup: 0.8, cutmix: 1.0}", "ema.decay=0.8", "optimizer.clip_norm=0.5"],
    "fp16": ["engine.precision=fp16"],
    "kernels1": ["engine.zero_stage=1", f"sparsity.accelerate={'require' if find_compiler() else 'off'}"],
}


def alone(root: Path, name: str, data: Path, *overrides: str):
    arguments = small(data, root / name, "{}", *RUNS[name], f"save.every={STEP}st", *overrides)
    with precision_of(name):
        trainer = build(arguments)
    return trainer.run_dir.path, observe(trainer)


@pytest.fixture(scope="module")
def one(small_net, tiny_data, tmp_path_factory):
    """Of each run its folder and what its one rank saw."""
    root = tmp_path_factory.mktemp("one")
    return {name: alone(root, name, tiny_data) for name in RUNS}


@pytest.fixture(scope="module")
def two(one, tiny_data, tmp_path_factory):
    """The same of two ranks, each rank's sight in a list, and of two ranks that went on from one."""
    out = tmp_path_factory.mktemp("two")
    runs = {
        name: small(tiny_data, out / name, "{}", *options, f"save.every={STEP}st")
        for name, options in RUNS.items()
    }
    for name in ("plain0", "whole"):
        folder = one[name][0]
        copy = shutil.copytree(folder, out / f"{name}-resumed" / "quickstart" / folder.name)
        point = checkpoint.step_folder(copy / "checkpoints", STEP)
        runs[f"{name}-resumed"] = [*runs[name], f"run_root={copy.parent.parent}", f"resume={point}"]
    (out / "runs.json").write_text(json.dumps(runs))
    arguments = [str(out / "runs.json"), str(out)]
    done = execute(launcher(*arguments, devices=2, module="tests.trainer.distributed.rank_results"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert [json.loads((out / f"masks-rank{rank}.json").read_text()) for rank in range(2)] == [["other"]] * 2
    found = {}
    for name in runs:
        (folder,) = (out / name / "quickstart").iterdir()
        found[name] = (folder, [torch.load(out / f"{name}-rank{rank}.pt") for rank in range(2)])
    return found


@pytest.mark.parametrize("name", ["plain0", "plain1", "accumulated", "plain0-resumed", "kernels1", "mixed"])
def test_two_ranks_train_what_one_trains(one, two, name):
    """Weights, momentum, masks, and every loss and score, to float32's rounding; two equal ranks."""
    (folder, sights), (other, _) = two[name], one[name.removesuffix("-resumed")]
    for key, value in sights[0]["weights"].items():
        assert torch.equal(value, sights[1]["weights"][key]), key
    ours, theirs = final_state(folder, 6), final_state(other, 6)
    assert len(ours["acdc"]["kernels"]) == (3 if name == "kernels1" and find_compiler() else 0)
    for key, value in ours["model"].items():
        assert torch.allclose(value.float(), theirs["model"][key].float(), rtol=1e-4, atol=1e-6), key
    for key, value in ours.get("averages", {}).items():
        assert torch.allclose(value, theirs["averages"][key], rtol=1e-4, atol=1e-6), key
    for key, value in ours["optimizer"].items():
        momentum, expected = value["momentum_buffer"], theirs["optimizer"][key]["momentum_buffer"]
        assert torch.allclose(momentum, expected, rtol=1e-3, atol=1e-5), key
    for kind, keys in (("step", ["loss"]), ("epoch", ["train_loss", "train_top1", "val_loss", "val_top1"])):
        mine, expected = records(folder, kind), records(other, kind)
        assert [record["step"] for record in mine] == [record["step"] for record in expected]
        for key in keys:
            assert [record[key] for record in mine] == pytest.approx([r[key] for r in expected], rel=1e-4)
    for key in ("mask_kept", "mask_dropped", "mask_regrown"):
        assert [record.get(key) for record in mine] == [record.get(key) for record in expected]


def test_two_ranks_refill_the_second_moments_of_dropped_weights_as_one_does(one, two):
    """AdamW, at ZeRO-1: the kept weights of a layer lie on both ranks; its steps are counted, and clipped."""
    states = [final_state(runs["adamw1"][0], 6) for runs in (two, one)]
    assert [state["optimizer_steps"] for state in states] == [6, 6]
    ours, theirs = (state["optimizer"] for state in states)
    assert ours.keys() == theirs.keys()
    for name, state in ours.items():
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.allclose(state[key], theirs[name][key], rtol=1e-3, atol=1e-8), (name, key)


def test_two_ranks_skip_the_same_steps_in_fp16(one, two):
    """A gradient that overflows on one rank does in the sum, which both have."""
    (folder, sights), (other, _) = two["fp16"], one["fp16"]
    for key, value in sights[0]["weights"].items():
        assert torch.equal(value, sights[1]["weights"][key]), key
    skipped = [final_state(run, 6)["loss_scaling"]["skipped"] for run in (folder, other)]
    assert all(0 < count < 6 for count in skipped)


def test_the_weights_move(one):
    """Else the test above would compare nothing."""
    before, after = (final_state(one["plain0"][0], step)["model"]["fc.weight"] for step in (STEP, STEP + 1))
    assert (after - before).abs().max() > 1e-3


def test_statistics_of_a_saved_and_evaluated_model_are_the_mean_over_ranks(two, tiny_data):
    folder, (first, second) = two["whole"]
    state = final_state(folder, 6)
    assert len(first["last"]) == 4
    for name, value in first["last"].items():
        a, b = first["own"][-1][name], second["own"][-1][name]
        assert not torch.equal(a, b), name  # each has seen its own half of the images
        assert torch.allclose(value, (a + b) / 2, rtol=1e-6), name
        assert torch.equal(value, second["last"][name]), name
        assert torch.equal(value, state["model"][name]), name
    expected = evaluated_by_hand(folder / "checkpoints" / "sparse", tiny_data)
    found = records(folder, "epoch")[-1]
    assert {key: found[f"val_{key}"] for key in expected} == pytest.approx(expected, rel=1e-5)


def test_each_rank_keeps_its_own_statistics_within_an_epoch(two):
    folder, _ = two["whole"]
    parts = final_state(folder, STEP)["ranks"]
    assert not torch.equal(*(part["buffers"]["bn1.running_mean"] for part in parts))
    assert not torch.equal(*(part["rng"]["cpu"] for part in parts))


@pytest.mark.parametrize(("name", "count"), [("whole", 6), ("whole-resumed", 1)])
def test_each_rank_drops_other_elements(two, name, count):
    """In every step, also of an epoch that one rank has begun; and in every step other ones."""
    _, sights = two[name]
    drawn = [sight["drawn"] for sight in sights]
    assert [len(steps) for steps in drawn] == [count] * 2
    everything = [*drawn[0], *drawn[1]]
    assert all(0.2 < dropped.float().mean() < 0.4 for dropped in everything)
    assert not any(torch.equal(a, b) for i, a in enumerate(everything) for b in everything[:i])


def test_one_rank_goes_on_where_two_were(one, two, tiny_data, tmp_path):
    folder, _ = two["plain1"]
    copy = shutil.copytree(folder, tmp_path / "plain1" / "quickstart" / folder.name)
    point = checkpoint.step_folder(copy / "checkpoints", STEP)
    folder, _ = alone(tmp_path, "plain1", tiny_data, f"resume={point}")
    ours, theirs = (final_state(run, 6)["model"] for run in (folder, one["plain1"][0]))
    for key, value in ours.items():
        assert torch.allclose(value.float(), theirs[key].float(), rtol=1e-4, atol=1e-6), key
    assert records(folder, "epoch")[-1]["train_loss"] == pytest.approx(
        records(one["plain1"][0], "epoch")[-1]["train_loss"], rel=1e-4
    )
