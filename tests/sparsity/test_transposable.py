import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsity import NM, Transposable24


def mask_of(weight):
    return Transposable24()({"w": weight})["w"]


def best_by_trial(block):
    """The greatest sum over all 4 x 4 patterns with two in each row and column."""
    pairs = list(itertools.combinations(range(4), 2))
    sums = []
    for rows in itertools.product(pairs, repeat=4):
        columns = [column for pair in rows for column in pair]
        if all(columns.count(column) == 2 for column in range(4)):
            sums.append(sum(abs(block[i][j]) for i, pair in enumerate(rows) for j in pair))
    assert len(sums) == 90
    return max(sums)


@given(st.lists(st.lists(st.integers(-50, 50), min_size=4, max_size=4), min_size=4, max_size=4))
def test_the_best_of_all_patterns(block):
    weight = torch.tensor(block, dtype=torch.float32)
    mask = mask_of(weight)
    assert mask.sum(0).tolist() == mask.sum(1).tolist() == [2] * 4
    assert (weight.abs() * mask).sum().item() == best_by_trial(block)


@pytest.mark.parametrize("shape", [(8, 12), (64, 32, 3, 3), (16, 16, 1, 1)])
def test_24_both_ways_at_every_kernel_position(shape):
    torch.manual_seed(0)
    mask = mask_of(
        torch.randn(shape).to(memory_format=torch.channels_last if len(shape) == 4 else torch.preserve_format)
    )
    planes = mask.flatten(2) if len(shape) == 4 else mask[..., None]
    for position in planes.unbind(2):
        assert (position.reshape(-1, 4).sum(1) == 2).all()
        assert (position.t().reshape(-1, 4).sum(1) == 2).all()


def test_layers_without_whole_blocks_are_pruned_row_by_row():
    torch.manual_seed(0)
    weights = {"stem": torch.randn(64, 3, 4, 4), "fc": torch.randn(10, 64), "whole": torch.randn(8, 8)}
    pattern = Transposable24()
    masks = pattern(weights)
    assert pattern.straddling(weights) == ["stem", "fc"]
    assert list(masks) == list(weights)
    for name, mask in NM(2, 4)({name: weights[name] for name in ("stem", "fc")}).items():
        assert torch.equal(masks[name], mask)


def test_it_keeps_less_than_row_by_row_and_more_than_half():
    """Of normal weights: 82 % of the squares, against 87 %."""
    torch.manual_seed(0)
    weight = torch.randn(256, 256)
    kept = [
        (weight[mask] ** 2).sum() / (weight**2).sum()
        for mask in (mask_of(weight), NM(2, 4)({"w": weight})["w"])
    ]
    assert kept[0] == pytest.approx(0.82, abs=0.01)
    assert kept[1] == pytest.approx(0.868, abs=0.01)
