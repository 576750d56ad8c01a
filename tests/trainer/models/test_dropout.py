import pytest
import torch
from torch import nn

from trainer.models.dropout import Dropout, uniform_bits


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5])
def test_it_drops_that_share_and_keeps_the_mean(p):
    torch.manual_seed(0)
    x = torch.ones(64, 64, 16, 16).to(memory_format=torch.channels_last).requires_grad_()
    y = Dropout(p)(x)
    assert (y == 0).float().mean().item() == pytest.approx(p, abs=0.002)
    assert y[y != 0].unique().tolist() == pytest.approx([1 / (1 - p)])
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
    for dims in ((0, 2, 3), (1, 2, 3)):  # no channel and no image is dropped more than others
        assert (y == 0).float().mean(dims).std() < 2 * (p * (1 - p) / (64 * 256)) ** 0.5


def test_the_generator_decides():
    layer, x = Dropout(0.5), torch.randn(8, 100)
    torch.manual_seed(1)
    first, second = layer(x), layer(x)
    torch.manual_seed(1)
    assert torch.equal(layer(x), first)
    assert not torch.equal(first, second)


def test_evaluation_and_no_probability_change_nothing():
    x = torch.randn(4, 5)
    assert torch.equal(Dropout(0.5).eval()(x), x)
    assert torch.equal(Dropout(0.0)(x), x)
    assert isinstance(Dropout(0.3), nn.Dropout)


@pytest.mark.slow
@pytest.mark.rare
def test_compiled_is_uncompiled():
    layer, x = Dropout(0.3), torch.randn(4, 16, 8, 8)
    torch.manual_seed(3)
    expected = layer(x)
    torch._dynamo.reset()
    torch.manual_seed(3)
    with torch._inductor.config.patch(fallback_random=True):  # the one seed is drawn alike
        found = torch.compile(layer, fullgraph=True, dynamic=False)(x)
    assert torch.equal(found, expected)


def test_bits_are_uniform_and_of_one_seed_unlike_those_of_another():
    bits = [uniform_bits(torch.Size([1 << 16]), torch.tensor(seed, dtype=torch.int32)) for seed in (1, 2)]
    for part in bits:
        assert part.min() >= 0
        counts = torch.bincount(part >> 23, minlength=256).double()
        assert ((counts - 256) ** 2 / 256).sum() < 400  # chi-squared, 255 degrees of freedom
    share = [((a ^ b) & 1).double().mean() for a, b in ((bits[0], bits[1]), (bits[0][1:], bits[0][:-1]))]
    assert share == pytest.approx([0.5, 0.5], abs=0.01)
