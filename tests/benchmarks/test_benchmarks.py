"""Every benchmark runs, in small, uncompiled: what it prints and records, not how fast anything is."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import (
    compare,
    compilation,
    inference,
    kernels24,
    overhead,
    peers,
    phase_switch,
    sparse_kernels,
    sparse_step,
    throughput,
)
from benchmarks.shared import machine, phases, turns
from benchmarks.shared.models import NETWORKS, short_run
from sparsity.kernels.unstructured.library import find_compiler
from tests.trainer.runs import run_here
from trainer.checkpoints.checkpoint import step_folder
from trainer.checkpoints.run_dir import DENSE_TWIN
from trainer.cli.main import main as acdc_command
from trainer.errors import exit_code_of
from trainer.export.sparse24_file import read_sparse24
from trainer.loaders import build_loaders
from trainer.loop import Trainer
from trainer.mask_history import load_masks

pytestmark = pytest.mark.usefixtures("needs_runs", "uncompiled")
needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")


def run(benchmark, monkeypatch, tmp_path, *arguments):
    """Its record."""
    out = tmp_path / "record.json"
    monkeypatch.setattr(sys, "argv", ["bench", *arguments, "--out", str(out)])
    assert benchmark.main() == 0
    record = json.loads(out.read_text())
    assert {"cpu", "packages", "revision", "command"} <= record["environment"].keys()
    return record


@pytest.mark.slow
def test_overhead(monkeypatch, tmp_path, capsys):
    small = ["resnet20", "--batch", "8", "--turns", "2", "--steps", "1"]
    result = run(overhead, monkeypatch, tmp_path, *small)["overhead"]["resnet20"]
    assert result["ratio"]["min"] <= result["ratio"]["median"] <= result["ratio"]["max"]
    assert "ours / stock" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.rare
def test_what_records_cost(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(overhead, "EVERY", 2)
    small = ["resnet20", "--logging", "--batch", "8", "--turns", "2", "--steps", "2"]
    result = run(overhead, monkeypatch, tmp_path, *small)["logging"]["resnet20"]
    assert result["steps"] == 4
    assert result["ms_per_step"].keys() == {"logged", "silent"}
    screen = capsys.readouterr().out
    assert screen.count("test: loss") == 3  # of the logged turns, with the one that warms up
    assert "logged / silent" in screen


@pytest.mark.slow
@pytest.mark.rare
def test_throughput(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(turns, "QUIET", 0.05)
    small = ["resnet20", "--batch", "8", "--turns", "2", "--steps", "3", "--warmup", "1", "--profile"]
    record = run(throughput, monkeypatch, tmp_path, *small)
    rows = record["throughput"]
    assert [(row["phase"], row["data"]) for row in rows] == [
        ("dense", "noise"),
        ("dense", "arrays"),
        ("compressed", "noise"),
        ("compressed", "arrays"),
    ]
    for row in rows:
        assert 0 < row["executed_flops"] <= row["dense_equivalent_flops"]
        assert (row["executed_flops"] < row["dense_equivalent_flops"]) == bool(row["layers_on_kernels"])
        assert 0 < row["step_p50"] <= row["step_p95"]
        assert 0 <= row["data_wait"]["min"] <= row["data_wait"]["max"] < 1
        assert ("cost_of_data" in row) == (row["data"] == "arrays")
        assert row["of_memory_roofline"] > 0
    whole = record["networks"]["resnet20"]
    assert whole["peak_memory_gb"] > 0.1
    assert whole["loader_alone"]["min"] > 0
    assert "bytes_error" not in whole
    assert whole["bytes_per_image"]["convolution"] > 0
    assert sum(whole["profile"]["shares"].values()) == pytest.approx(1)
    printed = capsys.readouterr().out
    assert "cost of data" in printed
    assert "loader alone" in printed
    compared = {name for name, *_ in compare.compare(record, record, 0.05)}
    assert "throughput/resnet20 dense arrays 8/cost_of_data" in compared
    assert "networks/resnet20/peak_memory_gb" in compared


@pytest.mark.parametrize("network", ["mobilenetv1", "resnet20"])
def test_noise_is_shaped_as_the_data_beside_it(tmp_path, network):
    config = short_run(NETWORKS[network], tmp_path, "sparse 2", 4, 2)
    loaders = build_loaders(config, torch.device("cpu"))
    trainer = SimpleNamespace(config=config, loaders=loaders, device=torch.device("cpu"))
    sources = phases.sources_of(trainer, real=True)
    assert list(sources) == ["noise", "files" if network == "mobilenetv1" else "arrays"]
    noise, real = (next(batches) for batches in sources.values())
    for found, expected in zip(noise, real, strict=True):
        assert (found.shape, found.stride(), found.dtype) == (
            expected.shape,
            expected.stride(),
            expected.dtype,
        )
    assert list(phases.sources_of(trainer, real=False)) == ["noise"]


def test_what_data_cost_is_turn_by_turn():
    def turn(*steps, refill=0.0):
        return phases.Turn(list(steps), 0.0, refill)

    noise = [turn(1.0, 1.0), turn(2.0, 2.0)]
    real = [turn(1.0, 1.0, refill=0.5), turn(2.0, 2.4)]
    cost = phases.cost_of_data(real, noise)
    assert cost == pytest.approx({"median": 0.175, "min": 0.1, "max": 0.25})


def test_compilation_counts_first_and_later_steps_apart():
    runs = [
        {"first": 9.0, "steps": [1.0, 2.0], "graphs": 1},
        {"first": 7.0, "steps": [3.0, 2.0], "graphs": 1},
    ]
    assert compilation.summary(runs) == {
        "first": {"median": 8.0, "min": 7.0, "max": 9.0},
        "step": {"median": 2.0, "min": 1.0, "max": 3.0},
        "graphs": 1,
    }


def test_an_unknown_network_is_an_error(monkeypatch, tmp_path):
    for benchmark in (sparse_kernels, sparse_step):
        with pytest.raises(SystemExit, match="no network 'resnet51'; there are resnet50, "):
            run(benchmark, monkeypatch, tmp_path, "resnet51")


def test_fewer_images_than_a_batch_are_an_error(monkeypatch, tmp_path):
    for benchmark, arguments in ((throughput, ["--images", "8"]), (peers, ["--images", "8"])):
        with pytest.raises(SystemExit, match="--images 8: a batch has 32"):
            run(benchmark, monkeypatch, tmp_path, "mobilenetv1", *arguments)


def test_the_peak_of_memory_is_of_what_came_last():
    cpu = torch.device("cpu")
    large = torch.ones(100_000_000)
    machine.forget_peak(cpu)
    with_it = machine.peak_gb(cpu)
    del large
    machine.forget_peak(cpu, free=True)
    assert machine.peak_gb(cpu) < with_it - 0.3


def test_phase_switch(monkeypatch, tmp_path):
    record = run(phase_switch, monkeypatch, tmp_path, "resnet20", "--repeats", "2", "--no-graphs")
    assert set(record["seconds"]) == {"global 90 %", "uniform 90 %", "2:4", "2:4 transposable"}
    for result in record["seconds"].values():
        assert result["num_weights"] == 268_336
        assert result["compress"]["median"] > 0


@pytest.mark.rare
def test_kernels24(monkeypatch, tmp_path, capsys):
    record = run(kernels24, monkeypatch, tmp_path, "--most", "1")
    assert record["reference"]
    assert [row["network"] for row in record["kernels"]] == ["resnet50", "wrn-28-10", "ViT-B", "ViT-L"]
    assert all(row["forward"]["error"] < 1e-5 for row in record["kernels"])
    assert "no 2:4 kernels on this machine" in capsys.readouterr().out


@pytest.mark.rare
@pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")
def test_sparse_kernels(monkeypatch, tmp_path, capsys):
    small = ["resnet20", "--percent", "50", "10", "--precision", "fp32", "--batch", "4"]
    result = run(sparse_kernels, monkeypatch, tmp_path, *small)["sparse_kernels"]["resnet20"]["fp32"]
    *shapes, whole = result["shapes"]
    assert sum(shape["layers"] for shape in shapes) == whole["layers"] == 20
    assert len({shape["shape"] for shape in shapes}) == len(shapes) == 7
    assert shapes[0]["dense_flops"] == 2 * 4 * 16 * 3 * 9 * 32 * 32  # layer conv1
    for shape in result["shapes"]:
        assert list(shape["kept"]) == ["10", "50"]
        for percent, kept in shape["kept"].items():
            executed = 3 * shape["dense_flops"] * int(percent) / 100
            assert kept["executed_gflops"] == pytest.approx(executed / sum(kept["sparse_us"]) / 1e3)
            assert kept["dense_to_sparse"] == pytest.approx(sum(shape["dense_us"]) / sum(kept["sparse_us"]))
    assert result["fma_fp32_gflops"] > 0
    assert "even at" in capsys.readouterr().out


def test_a_crossover_lies_between_two_densities():
    assert sparse_kernels.crossover([10, 20, 40], [0.5, 0.8, 1.2]) == pytest.approx(30)
    assert sparse_kernels.crossover([10, 20], [0.5, 0.9]) is None
    assert sparse_kernels.crossover([10, 20], [1.1, 1.9]) is None


@pytest.mark.slow
def test_sparse_step(monkeypatch, tmp_path, capsys):
    small = ["resnet20", "--percent", "90", "--precision", "fp32", "--batch", "8", "--turns", "1"]
    (result,) = run(sparse_step, monkeypatch, tmp_path, *small)["sparse_step"]
    assert (result["network"], result["precision"], result["percent"], result["batch"]) == (
        "resnet20",
        "fp32",
        90,
        8,
    )
    assert result["layers"] == 22  # 20 masked ones, and 2 shortcuts between them
    assert 0 <= result["sparse_layers"] <= 22
    assert all(result["ms_per_step"][who]["median"] > 0 for who in ("compressed", "dense", "stock"))
    whole = result["whole_run"]
    assert (whole["epochs"], whole["sparse_epochs"]) == (200, 110)
    cost = 1 / result["dense_to_compressed"]["median"]
    assert whole["of_dense"]["median"] == pytest.approx((90 + 110 * cost) / 200)
    printed = capsys.readouterr().out
    assert "dense /" in printed
    assert "whole run" in printed


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["dense 1, sparse 1", "dense 1, sparse 1, dense 1"])
def test_sparse_step_with_the_masks_of_a_run(monkeypatch, tmp_path, tiny_data, schedule):
    phases = [f"epochs={schedule.count('1')}", f"sparsity.schedule={schedule}"]
    trained = run_here(tiny_data, tmp_path / "runs", *phases, "save.mask_history=true")
    seen, accelerate = {}, Trainer.accelerate

    def watched(trainer):
        seen.update({name: mask.clone() for name, mask in trainer.acdc.masks().items()})
        accelerate(trainer)

    monkeypatch.setattr(Trainer, "accelerate", watched)
    small = ["--masks", str(trained), "--precision", "fp32", "--batch", "8", "--turns", "1"]
    (result,) = run(sparse_step, monkeypatch, tmp_path, *small)["sparse_step"]
    (kept,) = (trained / "masks").iterdir()
    masks = load_masks(kept)
    assert seen.keys() == masks.keys()
    assert all(torch.equal(seen[name], mask) for name, mask in masks.items())
    assert result["percent"] == pytest.approx(90, abs=0.1)
    assert (result["network"], result["whole_run"]["sparse_epochs"]) == ("quickstart", 1)


def test_masks_that_are_not_there_are_an_error(monkeypatch, tmp_path, tiny_data, capsys):
    dense = ["epochs=1", "sparsity.schedule=dense 1", "lr.warmup_epochs=0"]
    early = step_folder(run_here(tiny_data, tmp_path / "runs", *dense) / "checkpoints", 10)
    for path, message in ((early, "comes before the first compression"), (tmp_path, "is not a checkpoint")):
        monkeypatch.setattr(sys, "argv", ["bench", "--masks", str(path)])
        assert exit_code_of(sparse_step.main) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_inference_of_a_24_model(monkeypatch, tmp_path, tiny_data):
    model = ["model.name=mobilenetv1", "model.arguments={width: 0.25}"]
    pruned = [
        "sparsity.pattern=2:4",
        "sparsity.target=null",
        "epochs=2",
        "sparsity.schedule=dense 1, sparse 1",
    ]
    trained = run_here(tiny_data, tmp_path / "runs", *model, *pruned)
    small = [str(trained), "--batch", "8", "--turns", "1", "--steps", "1", "--all"]
    record = run(inference, monkeypatch, tmp_path, *small)
    assert record["chosen"]
    assert record["same_answer"] == 1
    assert record["largest_difference"] < 1e-4
    assert record["packed_bytes_share"] < 0.8
    out = tmp_path / "packed.safetensors"
    assert acdc_command(["export", str(trained), "--format", "sparse24", "--out", str(out)]) == 0
    assert any(name.endswith("weight") for name in read_sparse24(out))


@needs_compiler
def test_inference_of_an_unstructured_model(monkeypatch, tmp_path, tiny_data, capsys):
    trained = run_here(tiny_data, tmp_path / "runs", "epochs=2", "sparsity.schedule=dense 1, sparse 1")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    small = [str(trained), "--batch", "1", "3", "--turns", "2", "--steps", "1"]
    record = run(inference, monkeypatch, tmp_path, *small)
    results = record["inference"]
    assert [(result["percent"], result["batch"]) for result in results] == [(90, 1), (90, 3)]
    for result in results:
        assert result["fastest_of_ours"] in result["ours_over_fastest_rival"]
        assert result["largest_difference"]["ours fp32"] < 1e-5
        assert {"ours fp32", "torch fp32"} <= result["ms_per_batch"].keys()
        assert "ONNX Runtime fp32" not in result["ms_per_batch"]
    compared = {name for name, *_ in compare.compare(record, record, 0.05)}
    for batch in (1, 3):
        name = f"inference/resnet_cifar 90.0 {batch}"
        assert {f"{name}/ms_per_batch/ours fp32", f"{name}/ours_over_fastest_rival/ours fp32"} <= compared
    printed = capsys.readouterr().out
    assert "ONNX Runtime is left out: pip install onnxruntime" in printed
    assert "as fast as the fastest rival" in printed


@pytest.mark.slow
@needs_compiler
def test_inference_of_a_network_by_name(monkeypatch, tmp_path):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    small = ["resnet20", "--percent", "90", "--batch", "2", "--turns", "1"]
    (result,) = run(inference, monkeypatch, tmp_path, *small)["inference"]
    assert (result["network"], result["batch"], result["layers"]) == ("resnet20", 2, 22)
    assert result["percent"] == pytest.approx(90, abs=0.5)
    assert result["largest_difference"]["ONNX Runtime fp32"] < 1e-5
    assert result["same_answer"]["ours fp32"] == 1


def test_inference_of_a_model_that_is_wrong_ends_it(monkeypatch):
    model, described = next(inference.masked("resnet20", [90]))
    monkeypatch.setattr(
        inference, "ours", lambda model, images: {"ours fp32": (model, lambda: model(-images))}
    )
    monkeypatch.setattr(inference, "rivals", lambda *arguments: {})
    with pytest.raises(SystemExit, match="ours fp32 differs from the dense model"):
        inference.measure(model, described, 1, SimpleNamespace(turns=1, steps=1))


def test_inference_and_export_of_models_without_what_they_need(monkeypatch, tmp_path, tiny_data, capsys):
    trained = run_here(
        tiny_data, tmp_path / "runs", "epochs=2", "sparsity.schedule=dense 1, sparse 1", "sparsity.target=0.3"
    )
    wrong = {
        "no layer of this model drops weights": [str(trained / "checkpoints" / DENSE_TWIN)],
        "nowhere": [str(tmp_path / "nowhere")],
        "--percent is for networks by name": [str(trained), "--percent", "90"],
    }
    for message, arguments in wrong.items():
        monkeypatch.setattr(sys, "argv", ["bench", *arguments])
        assert exit_code_of(inference.main) == 2
        assert message in capsys.readouterr().err
    assert acdc_command(["export", str(trained), "--format", "sparse24", "--out", str(tmp_path / "a")]) == 2
    error = capsys.readouterr().err
    assert "no layer" in error
    assert "Traceback" not in error
