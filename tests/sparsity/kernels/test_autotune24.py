"""The choice between kernels, with times that are given: no test asserts a measured one."""

import pytest
import torch
from torch import nn

from sparsity import Run24, mask_layers
from sparsity.kernels import autotune24
from sparsity.kernels.autotune24 import Shape24, Timing, Tuned, candidates, measure24

SHAPE = Shape24(32, 48, 64)
CPU = torch.device("cpu")


def times(*seconds):
    given = iter(seconds)

    def seconds_of(call):
        call()
        return next(given)

    return seconds_of


def tune(seconds, transposable=False):
    return measure24(SHAPE, torch.bfloat16, CPU, transposable, times(*seconds))


@pytest.mark.parametrize(
    ("seconds", "transposable", "expected"),
    [
        ((2e-5, 1e-5), False, Run24.FORWARD),
        ((2e-5, 1.99e-5), False, Run24.NOT),  # no gain beyond the noise
        ((1e-5, 2e-5), False, Run24.NOT),
        ((2e-5, 1e-5, 2e-5, 1e-5), True, Run24.TRANSPOSED),
        ((2e-5, 1e-5, 1e-5, 2e-5), True, Run24.FORWARD),
        ((1e-5, 2e-5, 2e-5, 1e-5), True, Run24.NOT),
    ],
)
def test_the_faster_kernel_is_chosen(seconds, transposable, expected):
    tuned = tune(seconds, transposable)
    assert tuned.choose() is expected
    assert tuned.forward.dense == pytest.approx(1e6 * seconds[0])
    assert tuned.forward.error <= autotune24.TOLERANCE
    assert (tuned.gradient is None) == (not transposable)
    assert tuned.choose(required=True) is (Run24.TRANSPOSED if transposable else Run24.FORWARD)
    assert Tuned.of(tuned.as_dict()) == tuned


def test_a_wrong_kernel_is_never_chosen(monkeypatch):
    right = autotune24.mm24
    monkeypatch.setattr(autotune24, "mm24", lambda rows, weight, back: right(rows, weight, back) * 1.05)
    tuned = tune((2e-5, 1e-5))
    assert tuned.forward.error == pytest.approx(0.05, abs=0.01)
    assert tuned.choose() is tuned.choose(required=True) is Run24.NOT


def test_a_kernel_that_fails_is_never_chosen(monkeypatch):
    def fail(*arguments):
        raise RuntimeError("no kernel for this shape\nat some line")

    monkeypatch.setattr(autotune24, "mm24", fail)
    tuned = tune((2e-5, 1e-5))
    assert tuned.forward == Timing(20.0, None, None, "no kernel for this shape")
    assert tuned.choose() is tuned.choose(required=True) is Run24.NOT
    assert Tuned.of(tuned.as_dict()) == tuned


def test_real_times_are_measured():
    tuned = measure24(SHAPE, torch.float32, CPU, False)
    assert tuned.forward.dense > 0
    assert tuned.forward.sparse > 0


def test_candidates_fit_at_every_size():
    net = nn.Sequential(nn.Conv2d(16, 32, 1), nn.Conv2d(32, 32, 3), nn.Conv2d(32, 48, 1), nn.Linear(48, 10))
    layers = mask_layers(net)
    net.append(nn.Linear(16, 16))  # which nothing runs
    layers |= mask_layers(net, include=["4"])
    positions = {"0": [64, 36], "1": [64, 36], "2": [64, 9], "3": [1, 1]}
    shapes, reasons = candidates(layers, positions, images=2)
    assert shapes == {"0": Shape24(128, 16, 32)}
    assert reasons == {
        "1": "3x3 kernel",
        "2": "18 rows are no multiple of 8",
        "3": "10x48 is no multiple of 16",
        "4": "not run in a forward pass",
    }
