"""Whole runs on sparse CPU kernels: the run without them but for rounding, resumed bit for bit, in one more
graph."""

import json

import pytest
import torch
from torch import nn

from sparsity import ACDC, PhaseSchedule, UniformMagnitude
from sparsity.kernels.unstructured import fusion, library
from tests.trainer.runs import assert_equal_states, final_state, records, run_here, tiny
from trainer import kernels
from trainer.checkpoints import checkpoint
from trainer.config.load import load_config
from trainer.train import main

pytestmark = [
    pytest.mark.usefixtures("needs_runs"),
    pytest.mark.skipif(library.find_compiler() is None, reason="no C++ compiler"),
]

SHORT = ("steps_per_epoch=3", "save.every=4st", "save.keep=99", "sparsity.accelerate=require")
GRADUAL = ("sparsity.schedule=dense 1, sparse 5", "sparsity.gradual={end: 5}")
LAST = 18  # step


@pytest.fixture(autouse=True)
def _home(monkeypatch, tmp_path):
    monkeypatch.setenv("ACDC_DATA", str(tmp_path / "home"))


@pytest.mark.parametrize(
    "options",
    [
        ("engine.precision=fp32",),
        pytest.param(("engine.precision=bf16", "engine.zero_stage=1"), marks=pytest.mark.rare),
    ],
)
def test_a_run_is_resumed_bit_for_bit_and_equals_the_dense_one(tiny_data, tmp_path, capsys, options):
    run = run_here(tiny_data, tmp_path / "runs", *SHORT, *options)
    table = capsys.readouterr().out
    assert "kernels of compressed phases" in table
    assert f"sparse {options[0][-4:]} " in table
    assert "/40000" not in table  # tiles are in kernels.json
    state = final_state(run, LAST)
    assert len(state["acdc"]["kernels"]) == sum(name.endswith(".mask") for name in state["model"])
    for name, mask in state["model"].items():
        if name.endswith(".mask"):
            weight = state["model"][name.removesuffix("mask") + "weight"]
            assert (weight[~mask] == 0).all()

    for step in (4, 12):  # in the first sparse phase, and in a dense one
        within = checkpoint.step_folder(run / "checkpoints", step)
        assert main(tiny(tiny_data, tmp_path / "runs", *SHORT, *options, f"resume={within}")) == 0
        assert_equal_states(state, final_state(run, LAST))

    # another run takes what was measured, and is the same
    again = run_here(tiny_data, tmp_path / "again", *SHORT, *options)
    assert_equal_states(state, final_state(again, LAST))

    dense = run_here(tiny_data, tmp_path / "dense", *SHORT, *options, "sparsity.accelerate=off")
    losses = [[record["train_loss"] for record in records(each)] for each in (run, dense)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3 if "fp32" in options[0] else 5e-2)


@pytest.mark.rare
def test_a_compiled_run_is_resumed_bit_for_bit(tiny_data, tmp_path, monkeypatch):
    fused, fuse = [], fusion.fuse
    monkeypatch.setattr(fusion, "fuse", lambda graph: fused.append(fuse(graph)))
    options = (*SHORT, "engine.compile=true")
    torch._dynamo.reset()
    run = run_here(tiny_data, tmp_path / "runs", *options)
    state = final_state(run, LAST)
    for step in (4, 12):  # in the first sparse phase, and in a dense one
        torch._dynamo.reset()
        within = checkpoint.step_folder(run / "checkpoints", step)
        assert main(tiny(tiny_data, tmp_path / "runs", *options, f"resume={within}")) == 0
        assert_equal_states(state, final_state(run, LAST))
    assert sum(count > 0 for count in fused) == 3  # a run's sparse graph


@pytest.mark.slow
def test_gradual_pruning_chooses_late_and_is_resumed_bit_for_bit(tiny_data, tmp_path):
    run = run_here(tiny_data, tmp_path / "runs", *SHORT, *GRADUAL)
    state = final_state(run, LAST)
    numbers = [len(final_state(run, step)["acdc"]["kernels"]) for step in (4, 8, 12, 16)]
    layers = sum(name.endswith(".mask") for name in state["model"])
    assert numbers == [0, 0, layers, layers]  # epoch 3 begins with step 9
    for step in (8, 12):
        within = checkpoint.step_folder(run / "checkpoints", step)
        assert main(tiny(tiny_data, tmp_path / "runs", *SHORT, *GRADUAL, f"resume={within}")) == 0
        assert_equal_states(state, final_state(run, LAST))


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), GRADUAL])
def test_compiled_kernels_cost_one_graph(tiny_data, tmp_path, options):
    torch._dynamo.reset()
    run = run_here(tiny_data, tmp_path / "runs", *SHORT, *options, "engine.compile=true")
    compiled = json.loads((run / "result.json").read_text())["compile"]
    assert compiled["graphs"] == 3  # dense, evaluation, sparse
    assert compiled["recompilations"] == 1  # the first sparse step, and no switch after it


def test_without_a_compiler_auto_says_what_it_costs(tiny_data, tmp_path, monkeypatch, caplog, capsys):
    monkeypatch.setattr("sparsity.execution.find_compiler", lambda: None)
    dense = run_here(tiny_data, tmp_path / "dense", *SHORT, "sparsity.accelerate=off")
    auto = run_here(tiny_data, tmp_path / "auto", *SHORT, "sparsity.accelerate=auto")
    assert caplog.text.count("no faster than dense phases: kernels need a C++ compiler (g++ or clang++)") == 1
    assert_equal_states(final_state(auto, LAST), final_state(dense, LAST))
    assert main(tiny(tiny_data, tmp_path / "runs", *SHORT)) == 3
    assert "kernels for global masks need a C++ compiler" in capsys.readouterr().err


@pytest.mark.usefixtures("loads_anew")
def test_a_build_that_fails_is_said_so(tiny_data, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(library, "SOURCES", tmp_path)
    (tmp_path / "layer.cpp").write_text("int main( { }")
    with pytest.raises(library.BuildError, match=r"failed: .*error"):
        library.load()
    run_here(tiny_data, tmp_path / "auto", *SHORT, "sparsity.accelerate=auto")
    assert "kernels need a build of their C++ that works" in caplog.text


@pytest.mark.usefixtures("loads_anew")
def test_kernels_of_another_machine_run_dense(tiny_data, tmp_path, monkeypatch, caplog):
    run = run_here(tiny_data, tmp_path / "runs", *SHORT)
    within = checkpoint.step_folder(run / "checkpoints", 4)
    monkeypatch.setattr(kernels, "family_for", lambda *_: "a machine that has them")
    monkeypatch.setattr(library, "SOURCES", tmp_path / "nowhere")
    library._load_once.cache_clear()
    auto = [*SHORT, "sparsity.accelerate=auto", f"resume={within}"]
    assert main(tiny(tiny_data, tmp_path / "runs", *auto)) == 0
    assert "runs dense" in caplog.text
    assert final_state(run, LAST)["acdc"]["kernels"] == {}


@pytest.mark.rare
def test_kernels_of_another_precision_are_chosen_anew(tiny_data, tmp_path, caplog):
    run = run_here(tiny_data, tmp_path / "runs", *SHORT)
    within = checkpoint.step_folder(run / "checkpoints", 4)
    for options, begin in (("engine.precision=bf16",), "sparse bf16 "), (("sparsity.accelerate=off",), ""):
        arguments = [*SHORT, *options, f"resume={within}"]
        assert main(tiny(tiny_data, tmp_path / "runs", *arguments)) == 0
        names = final_state(run, LAST)["acdc"]["kernels"].values()
        assert any(name.startswith(begin) for name in names) == bool(begin), names
        assert all(name.startswith((begin, "dense innermost")) for name in names), names
    assert "cannot run here" not in caplog.text  # nobody asked for them


def test_kernels_that_one_rank_lacks_run_on_none(monkeypatch):
    """Or the others would wait for it, where rank 0 tells what it chose."""
    config = load_config("quickstart", ["engine.precision=fp32"])
    schedule = PhaseSchedule.parse("dense 1, sparse 1")
    acdc = ACDC(nn.Sequential(nn.Linear(4, 4)), UniformMagnitude(0.5), schedule, 1)
    monkeypatch.setattr(kernels.ranks, "all_gather", lambda value: [value, "a C++ compiler"])
    monkeypatch.setattr(kernels.ranks, "on_main", lambda choose: pytest.fail("not on every rank"))
    assert kernels.accelerate(config, acdc, torch.device("cpu"), {}) == []
