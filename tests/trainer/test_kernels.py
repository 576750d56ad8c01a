"""2:4 execution in whole runs: by the reference where the machine has no such kernels, told to go ahead."""

import json

import pytest
import torch
from torch import Tensor, nn

from data.atomic import write_text
from sparsity import Run24, Transposable24
from sparsity.kernels.choose import LayerChoice, Measurements, gain
from sparsity.kernels.measure import Measured, Timing
from sparsity.kernels.semi_structured.family import Family24, Shape
from sparsity.kernels.semi_structured.operator import DTYPES
from tests.slow import slow
from tests.trainer.runs import assert_equal_states, final_state, run_here, tiny
from trainer import kernels
from trainer.checkpoints import checkpoint
from trainer.models import MODELS
from trainer.train import main

pytestmark = pytest.mark.usefixtures("needs_runs")
SHORT = ["model.name=pointwise", "model.arguments={}", "steps_per_epoch=3"]
LAST = 18  # step


class Pointwise(nn.Module):
    """1x1 convolutions, two of one shape, as 2:4 kernels run them, and a 3x3 one that none runs."""

    def __init__(self, num_classes: int, in_channels: int = 1) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels, 32, 3, 4, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 64, 1),
            nn.ReLU(),
            nn.Conv2d(64, 64, 1),
            nn.ReLU(),
            nn.Conv2d(64, 64, 1),
        )
        self.fc = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layers(x).mean((2, 3)))


@pytest.fixture(autouse=True)
def _pointwise(monkeypatch):
    monkeypatch.setitem(MODELS, "pointwise", Pointwise)


@pytest.fixture
def able(monkeypatch, tmp_path):
    """As on a machine with kernels; the reference runs in their place, and its times are made to win."""
    monkeypatch.setenv("ACDC_DATA", str(tmp_path / "home"))

    def family_for(pattern, device, dtype):
        if dtype not in DTYPES:
            return "bf16: engine.precision=bf16"
        return Family24(device, dtype, isinstance(pattern, Transposable24))

    monkeypatch.setattr(kernels, "family_for", family_for)
    measured = []

    def measure(family, shape):
        measured.append(shape)
        won = Timing(2.0, 1.0, 0.0)
        return Measured(won, won if family.transposable else None)

    monkeypatch.setattr(Family24, "measure", measure)
    return measured


def options(pattern="2:4", setting="auto"):
    return [*SHORT, f"sparsity.pattern={pattern}", "sparsity.target=null", f"sparsity.accelerate={setting}"]


def test_without_kernels_auto_is_off_and_require_is_an_error(tiny_data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(kernels, "family_for", lambda *_: "a machine that has them")
    auto = run_here(tiny_data, tmp_path / "auto", *options())
    off = run_here(tiny_data, tmp_path / "off", *options(setting="off"))
    assert_equal_states(final_state(auto, LAST), final_state(off, LAST))
    assert not (auto / "kernels.json").exists()
    assert main(tiny(tiny_data, tmp_path / "runs", *options(setting="require"))) == 3
    error = capsys.readouterr().err
    assert "kernels for 2:4 masks need a machine that has them" in error
    assert "Traceback" not in error
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").glob("*/*/checkpoints"))


def test_precision_is_part_of_what_is_needed(tiny_data, tmp_path, able, capsys):
    wanted = [*options(setting="require"), "engine.precision=fp32"]
    assert main(tiny(tiny_data, tmp_path / "runs", *wanted)) == 3
    assert "need bf16: engine.precision=bf16" in capsys.readouterr().err


@pytest.mark.parametrize("pattern", ["2:4", *slow("2:4 transposable")])
def test_a_run_with_24_kernels(tiny_data, tmp_path, able, capsys, pattern):
    wanted = [*options(pattern), "engine.precision=bf16", "save.every=5st", "save.keep=99"]
    run = run_here(tiny_data, tmp_path / "runs", *wanted)
    table = capsys.readouterr().out
    assert "kernels of compressed phases" in table
    assert "3x3 kernel" in table
    expected = Run24.TRANSPOSED if "transposable" in pattern else Run24.FORWARD
    records = json.loads((run / "kernels.json").read_text())
    chosen = [record["layer"] for record in records if record["choice"] == expected.name]
    assert chosen
    assert len(able) == len(set(able)) == len({tuple(r["shape"].values()) for r in records if r["shape"]})
    state = final_state(run, LAST)
    assert state["acdc"]["kernels"] == dict.fromkeys(chosen, expected.name)
    for name, mask in state["model"].items():
        if name.endswith(".mask"):
            weight = state["model"][name.removesuffix("mask") + "weight"]
            assert (weight[~mask] == 0).all()

    # another run measures nothing anew; a resumed one keeps its kernels and equals the first
    able.clear()
    again = run_here(tiny_data, tmp_path / "again", *wanted)
    assert not able
    assert_equal_states(state, final_state(again, LAST))
    within = checkpoint.step_folder(run / "checkpoints", 5)  # in the first sparse phase
    assert main(tiny(tiny_data, tmp_path / "runs", *wanted, f"resume={within}")) == 0
    assert_equal_states(state, final_state(run, LAST))


def test_a_damaged_cache_is_measured_anew(tmp_path):
    def cache():
        return Measurements(tmp_path / "k.json", "bf16", write_text)

    shape, tuned = Shape(8, 16, 32), Measured(Timing(2.0, None, None, "no"))
    first = cache()
    first.known[shape] = tuned
    first.write()
    assert cache().known == {shape: tuned}
    other = Measurements(tmp_path / "k.json", "fp16", write_text)
    assert not other.known
    other.known[shape] = tuned
    other.write()
    assert cache().known == {shape: tuned}  # entries of other kinds stay
    kept = (tmp_path / "k.json").read_text()
    of_no_numbers = [kept.replace("2.0", damage) for damage in ("null", '"2.0"', "[]")]
    for damage in ("", "{", "[]", '{"x": 1}', kept.replace("8x16", "8y"), *of_no_numbers):
        (tmp_path / "k.json").write_text(damage)
        assert not cache().known


def test_the_gain_counts_what_was_chosen():
    tuned = Measured(Timing(3.0, 1.0, 0.0), Timing(5.0, 2.0, 0.0))
    choices = [
        LayerChoice("a", Run24.TRANSPOSED, Shape(8, 16, 16), tuned),
        LayerChoice("b", Run24.FORWARD, Shape(8, 16, 16), tuned),
        LayerChoice("c", Run24.NOT, Shape(8, 16, 16), tuned),
        LayerChoice("d", Run24.NOT, reason="3x3 kernel"),
    ]
    assert gain(choices) == {"dense_us": 24.0, "chosen_us": 3.0 + 6.0 + 8.0}


@pytest.mark.slow
def test_require_is_an_error_where_a_kernel_fails(tiny_data, tmp_path, able, monkeypatch, capsys):
    broken = Measured(Timing(2.0, None, None, "no kernel image"))
    monkeypatch.setattr(Family24, "measure", lambda family, shape: broken)
    wanted = [*options(setting="require"), "engine.precision=bf16"]
    assert main(tiny(tiny_data, tmp_path / "runs", *wanted)) == 3
    error = capsys.readouterr().err
    assert "sparsity.accelerate=require: kernels for NM(n=2, m=4, rule='exact') masks:" in error
    assert "layers cannot run them" in error
    assert "no kernel image; with auto they run masked dense" in error
    auto = [*options(), "engine.precision=bf16"]
    run = run_here(tiny_data, tmp_path / "auto", *auto)
    assert final_state(run, LAST)["acdc"]["kernels"] == {}
    assert "dense: no kernel image" in capsys.readouterr().out


@pytest.mark.slow
def test_no_memory_to_measure_is_no_end(tiny_data, tmp_path, able, monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Family24, "measure", full)
    run = run_here(tiny_data, tmp_path / "runs", *options(), "engine.precision=bf16")
    assert final_state(run, LAST)["acdc"]["kernels"] == {}
    assert "no memory left to measure it" in (run / "kernels.json").read_text()
    kept = json.loads((tmp_path / "home" / "kernels.json").read_text())
    assert all(not entries for entries in kept.values())  # another run tries again
