"""The choice between kernels, with times that are given: no test asserts a measured one."""

import pytest
import torch
from torch import nn

from sparsity import Run24, mask_layers
from sparsity.flops import Call
from sparsity.kernels import measure
from sparsity.kernels.choose import LayerChoice, best_region, candidates
from sparsity.kernels.measure import Measured, Timing
from sparsity.kernels.semi_structured import family
from sparsity.kernels.semi_structured.family import Family24, Shape
from sparsity.kernels.unstructured.kernel import DENSE_INNERMOST

SHAPE = Shape(32, 48, 64)
CPU = torch.device("cpu")


@pytest.fixture
def tune(monkeypatch):
    """Measures SHAPE as if kernels took these seconds, one after another."""

    def measured(seconds, transposable=False):
        given = iter(seconds)
        monkeypatch.setattr(measure, "median_seconds", lambda call, device: next(given))
        return Family24(CPU, torch.bfloat16, transposable).measure(SHAPE)

    return measured


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
def test_the_faster_kernel_is_chosen(tune, seconds, transposable, expected):
    tuned = tune(seconds, transposable)
    assert Family24.choose(tuned) is expected
    assert tuned.forward.dense == pytest.approx(1e6 * seconds[0])
    assert tuned.forward.error <= measure.TOLERANCE
    assert (tuned.gradient is None) == (not transposable)
    assert Family24.choose(tuned, required=True) is (Run24.TRANSPOSED if transposable else Run24.FORWARD)
    assert Measured.of(tuned.as_dict()) == tuned


def test_a_wrong_kernel_is_never_chosen(monkeypatch, tune):
    right = family.mm24
    monkeypatch.setattr(family, "mm24", lambda *arguments: right(*arguments) * 1.05)
    tuned = tune((2e-5, 1e-5))
    assert tuned.forward.error == pytest.approx(0.05, abs=0.01)
    assert Family24.choose(tuned) is Family24.choose(tuned, required=True) is Run24.NOT


def test_a_kernel_that_fails_is_never_chosen(monkeypatch, tune):
    def fail(*arguments):
        raise RuntimeError("no kernel for this shape\nat some line")

    monkeypatch.setattr(family, "mm24", fail)
    tuned = tune((2e-5, 1e-5))
    assert tuned.forward == Timing(20.0, None, None, "no kernel for this shape")
    assert Family24.choose(tuned) is Family24.choose(tuned, required=True) is Run24.NOT
    assert Measured.of(tuned.as_dict()) == tuned


def test_a_result_that_should_be_zero_is_wrong():
    assert measure.relative_error(torch.ones(3), torch.zeros(3)) > measure.TOLERANCE
    assert measure.relative_error(torch.zeros(3), torch.zeros(3)) == 0
    assert not Timing(1.0, 1.0, measure.relative_error(torch.tensor([torch.nan]), torch.ones(1))).right


def test_real_times_are_measured():
    tuned = Family24(CPU, torch.float32, False).measure(SHAPE)
    assert tuned.forward.dense > 0
    assert tuned.forward.sparse > 0


def test_candidates_fit_at_every_size():
    net = nn.Sequential(nn.Conv2d(16, 32, 1), nn.Conv2d(32, 32, 3), nn.Conv2d(32, 48, 1), nn.Linear(48, 10))
    layers = mask_layers(net)
    net.append(nn.Linear(16, 16))  # which nothing runs
    layers |= mask_layers(net, include=["4"])
    sizes = {"0": [64, 36], "1": [64, 36], "2": [64, 9], "3": [1, 1]}
    calls = {name: [Call(size, 1, size) for size in given] for name, given in sizes.items()}
    shapes, reasons = candidates(Family24(CPU, torch.bfloat16, False), layers, calls, images=2)
    assert shapes == {"0": Shape(128, 16, 32, 1, 64)}
    assert reasons == {
        "1": "3x3 kernel",
        "2": "18 rows are not a multiple of 8",
        "3": "10x48 is not a multiple of 16",
        "4": "not run in a forward pass",
    }


def choice(name, dense, sparse, conversion):
    """One of a family whose kernels have a memory format of their own; sparse None: it was not measured."""
    if sparse is None:
        return LayerChoice(name, None, reason="3x3 kernel")
    measured = Measured(Timing(dense, sparse, 0.0), conversion=conversion)
    return LayerChoice(name, Run24.FORWARD if sparse < dense + conversion else None, SHAPE, measured)


@pytest.mark.parametrize(
    ("layers", "expected"),  # s: sparse, d: dense between two changes of the format, -: dense
    [
        ([(10, 5, 4), (10, 5, 4)], "ss"),
        ([(10, 9, 4), (10, 9, 4)], "--"),  # what two layers gain, changing the format at both ends costs
        ([(10, 9, 4)] * 5, "sssss"),
        ([(10, 30, 4), (10, 1, 4), (10, 30, 4), (10, 1, 4), (10, 30, 4)], "-sds-"),
        ([(10, 1, 2), (10, 30, 18), (10, 1, 2)], "s--"),  # two changes would cost more than a layer gains
        ([(10, 1, 2), (10, 12, 18), (10, 1, 2)], "sss"),  # a little slower, and cheaper than changes
        ([(10, 1, 2), (10, None, 0), (10, 1, 2)], "sds"),
        ([(10, 11, 2)] * 3, "---"),
    ],
)
def test_a_region_of_layers_keeps_its_format(layers, expected):
    choices = [choice(str(index), *layer) for index, layer in enumerate(layers)]
    letters = {None: "-", Run24.FORWARD: "s", DENSE_INNERMOST: "d"}
    assert "".join(letters[each.kernel] for each in best_region(choices, DENSE_INNERMOST)) == expected
    alone = best_region(choices)  # of a family without such a kernel
    assert "".join(letters[each.kernel] for each in alone) == expected.replace("d", "-")


def test_what_is_required_runs_slower_or_not():
    measured = Measured(Timing(10, 30, 0.0), conversion=4)
    choices = [LayerChoice("fast", Run24.FORWARD, SHAPE, measured), LayerChoice("other", None)]
    chosen = best_region([choices[1], *choices, *choices, choices[1]], DENSE_INNERMOST, required=True)
    names = [None if each.kernel is None else each.kernel.name for each in chosen]
    assert names == [None, "2:4 forward", "dense innermost", "2:4 forward", None, None]
