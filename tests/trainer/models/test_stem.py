"""What a GPU's compiled graph has in place of a stem's convolution and pooling is equal to it."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from trainer.models import get_model, stem


def gradients(output, inputs):
    torch.manual_seed(1)
    return torch.autograd.grad(output, inputs, torch.randn(output.shape, dtype=output.dtype))


@pytest.mark.parametrize(("size", "channels"), [(3, 3), (7, 3), (7, 1), (11, 4)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_a_convolution_by_depth_is_the_convolution(size, channels, with_bias):
    torch.manual_seed(0)
    options = {"dtype": torch.float64, "requires_grad": True}
    input, weight = (
        torch.randn(2, channels, 20, 12, **options),
        torch.randn(5, channels, size, size, **options),
    )
    bias = torch.randn(5, **options) if with_bias else None
    expected = functional.conv2d(input, weight, bias, 2, size // 2)
    found = stem.conv_by_depth(input, weight, bias, size // 2)
    torch.testing.assert_close(found, expected)
    inputs = [each for each in (input, weight, bias) if each is not None]
    torch.testing.assert_close(gradients(found, inputs), gradients(expected, inputs))


@pytest.mark.parametrize("shape", [(2, 8, 16, 12), (1, 3, 2, 2), (3, 5, 2, 8)])
@pytest.mark.parametrize("kind", ["zeros", "negative", "nan"])
def test_pooling_is_the_pooling_in_ties_and_nan_too(shape, kind):
    torch.manual_seed(0)
    input = torch.randn(shape)
    input = {"zeros": input.relu(), "negative": -input.abs(), "nan": input.masked_fill(input > 1, torch.nan)}[
        kind
    ].requires_grad_()
    expected, found = functional.max_pool2d(input, 3, 2, 1), stem.max_pool(input)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(gradients(found, [input]), gradients(expected, [input]))


def test_the_gradients_operator_is_sound():
    grad, place = torch.randn(2, 3, 4, 5), torch.randint(0, 9, (2, 3, 4, 5), dtype=torch.int8)
    checks = torch.library.opcheck(
        stem.stem_pool_gradient, (grad, place), test_utils=("test_schema", "test_faketensor")
    )
    assert set(checks.values()) == {"SUCCESS"}


def small_stem(*layers):
    return nn.Sequential(*layers, nn.ReLU(), nn.MaxPool2d(3, 2, 1)).to(memory_format=torch.channels_last)


@pytest.mark.rare
def test_a_compiled_network_is_the_uncompiled_one():
    torch.manual_seed(0)
    plain = small_stem(nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8))
    other = copy.deepcopy(plain)
    compiled = torch.compile(other, backend=stem.inductor, dynamic=False)
    images = torch.randn(4, 3, 32, 32).to(memory_format=torch.channels_last)
    expected, found = plain(images), compiled(images)
    torch.testing.assert_close(found, expected)
    assert found.is_contiguous(memory_format=torch.channels_last)
    theirs = gradients(expected, list(plain.parameters()))
    torch.testing.assert_close(gradients(found, list(other.parameters())), theirs, rtol=1e-4, atol=1e-3)


def replaced_in(module, shape):
    counts = []

    def backend(graph, inputs):
        counts.append(stem.rewrite(graph))
        return graph.forward

    torch._dynamo.reset()
    torch.compile(module, backend=backend)(torch.randn(shape))
    return sum(counts)


@pytest.mark.parametrize(
    ("module", "shape", "expected"),
    [
        (get_model("resnet18", 10), (2, 3, 64, 64), 2),
        (get_model("mobilenetv1", 10), (2, 3, 64, 64), 1),
        (small_stem(nn.Conv2d(3, 8, 7, 2, 3)), (2, 3, 30, 32), 1),  # 15 lines are left to the pooling
        (small_stem(nn.Conv2d(3, 8, 7, 2, 3)), (2, 3, 33, 32), 0),
        (small_stem(nn.Conv2d(8, 8, 7, 2, 3)), (2, 8, 32, 32), 1),
        (nn.Conv2d(3, 8, 5, 2, 2), (2, 3, 32, 32), 0),
        (nn.Conv2d(3, 8, 3, 1, 1), (2, 3, 32, 32), 0),
        (nn.Conv2d(3, 8, 3, 2, 0), (2, 3, 32, 32), 0),
        (nn.Conv2d(3, 6, 3, 2, 1, groups=3), (2, 3, 32, 32), 0),
        (nn.MaxPool2d(2), (2, 3, 32, 32), 0),
    ],
)
def test_what_is_replaced_and_what_only_looks_alike(module, shape, expected):
    assert replaced_in(module, shape) == expected
