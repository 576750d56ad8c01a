"""Bytes of a training step, against counts by hand. All numbers are of values of 4 bytes."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from benchmarks.shared.traffic import Traffic

MAP = 4 * 8 * 8  # values of one of Net's maps, of one image


class Net(nn.Module):
    """A residual block, pooling and a linear layer, for images of 3 x 8 x 8."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.fc = nn.Linear(64, 10)

    def forward(self, x):
        b = functional.relu(self.norm1(self.conv1(x)))
        e = functional.relu(self.norm2(self.conv2(b)) + b)
        return self.fc(functional.max_pool2d(e, 2).flatten(1))


def counted(batch):
    """Values by kind of a whole training step of Net."""
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), 0.1, 0.9, fused=True)
    images, gradient = torch.randn(batch, 3, 8, 8), torch.randn(batch, 10)

    def step():
        net(images).backward(gradient)
        optimizer.step()

    return values(step)


def values(call):
    """Values by kind of what a call does."""
    with Traffic() as traffic:
        call()
    return {kind: moved / 4 for kind, moved in traffic.bytes.items()}


def test_a_step_by_hand():
    """x -conv1- a -norm1, relu- b -conv2- c -norm2, + b, relu- e -pool- f -fc- logits"""
    images, x, f, logits, places = 5, 3 * 8 * 8, 64, 10, 64 / 4
    a = b = c = e = MAP
    w1, w2, fc = 3 * 4 * 9, 4 * 4 * 9, 640
    relu2 = e + e  # read where the gradient before this ReLU is made: pooling's, and e
    relu1 = c + b + b  # that gradient, written when it is needed again; what conv2 sends back, and b
    convolutions = (x + a) + (b + c) + (2 * c + b + b) + (2 * a + x)
    norms = a + c + (relu2 + c) + (relu1 + a)
    written = c + a  # the gradients before both ReLUs: each is needed again
    maps = (a + b) + (c + b + e) + written + (c + c + c) + (a + a + a)
    products = (f + logits) + (logits + f) + (logits + f)
    pooling = (e + f + places) + (f + places + e)
    assert counted(images) == {
        "convolution": images * convolutions + 3 * w1 + 3 * w2,
        "batch norm": images * norms,
        "element-wise": images * maps,
        "other": images * (products + pooling) + (fc + 10) + fc + fc,
        "reductions": images * logits,
        "optimizer": 5 * (w1 + w2 + 4 * 4 + fc + 10),
    }


def test_bytes_grow_linearly_with_the_batch():
    two, four, eight = (counted(batch) for batch in (2, 4, 8))
    for kind in two:
        assert eight[kind] - four[kind] == 2 * (four[kind] - two[kind])
        assert (four[kind] > two[kind]) == (kind != "optimizer")


X = torch.randn(2, 4, 8, 8)
SIZE = X.numel()
WEIGHT = torch.randn(4, 4, 1, 1)


def test_element_wise_operators_in_a_row_are_one_pass():
    def call():
        functional.conv2d(functional.relu(X * 2 + other) * X, WEIGHT)

    other = torch.randn_like(X)
    found = values(call)
    assert found["element-wise"] == 2 * SIZE + SIZE  # X once, though two operators read it
    assert found["convolution"] == SIZE + 16 + SIZE


def test_what_is_written_once_is_read_from_there():
    def call():
        y = X * 2
        functional.conv2d(y, WEIGHT)
        functional.conv2d(y, WEIGHT)
        functional.conv2d(y + 1, WEIGHT)

    assert values(call)["element-wise"] == 2 * SIZE + 2 * SIZE


def test_what_no_other_operator_needs_moves_nothing():
    assert values(lambda: functional.relu(X * 2) + 1) == {}


def test_what_is_overwritten_is_not_read():
    target = torch.ones_like(X)
    assert values(lambda: functional.conv2d(target.copy_(X), WEIGHT))["element-wise"] == 2 * SIZE
    assert values(lambda: functional.conv2d(target.zero_(), WEIGHT))["element-wise"] == SIZE


def test_a_reduction_reads_what_leads_to_its_input():
    assert values(lambda: (X * X + 1).sum((2, 3))) == {"reductions": SIZE}


def test_batch_norm_is_a_reduction_and_then_element_wise():
    def call():
        functional.conv2d(functional.relu(nn.BatchNorm2d(4)(X)), WEIGHT)

    found = values(call)
    assert found["batch norm"] == SIZE
    assert found["element-wise"] == 2 * SIZE


def test_a_convolutions_backward_pass_reads_the_gradient_twice():
    x, weight = X.clone().requires_grad_(), WEIGHT.clone().requires_grad_()
    y = functional.conv2d(x, weight)
    gradient = torch.randn_like(y)
    assert values(lambda: y.backward(gradient)) == {"convolution": 2 * SIZE + (SIZE + 16) + (SIZE + 16)}


def test_pooling_keeps_a_byte_for_each_window():
    x = X.clone().requires_grad_()
    windows = SIZE / 4
    forward = values(lambda: functional.max_pool2d(x, 2))
    assert forward == {"other": SIZE + windows + windows / 4}
    y = functional.max_pool2d(x, 2)
    gradient = torch.randn_like(y)
    assert values(lambda: y.backward(gradient)) == {"other": windows + windows / 4 + SIZE}


def test_views_and_untouched_memory_move_nothing():
    assert values(lambda: torch.empty_like(X).view(2, -1).t().unsqueeze(0)) == {}


def test_of_an_expanded_tensor_those_values_count_that_exist():
    one = torch.ones(1, 4, 1, 1)
    found = values(lambda: functional.conv2d(one.expand(2, 4, 8, 8) * X, WEIGHT))
    assert found["element-wise"] == 4 + SIZE + SIZE


def test_half_as_many_bytes_in_bf16():
    half = X.bfloat16()
    found = values(lambda: functional.conv2d(half, WEIGHT.bfloat16()))
    assert found["convolution"] == pytest.approx((SIZE + 16 + SIZE) / 2)
