import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsity.patterns import select
from sparsity.patterns.select import kth_largest


def expected(values, k):
    flat = torch.cat([part.flatten() for part in values])
    value = flat.sort(descending=True).values[k - 1]
    return value.item(), int((flat > value).sum()), int((flat == value).sum())


@given(
    st.lists(st.lists(st.floats(0, 2.0**127, width=32), min_size=1, max_size=30), min_size=1, max_size=4),
    st.sampled_from([torch.float32, torch.float64]),
    st.data(),
)
def test_as_sorting_says(lists, dtype, data):
    values = [torch.tensor(numbers, dtype=dtype) for numbers in lists]
    k = data.draw(st.integers(1, sum(map(len, lists))))
    assert kth_largest(values, k) == expected(values, k)
    if dtype == torch.float32:  # what a GPU runs
        assert select._by_bisection(values, k) == expected(values, k)


@pytest.mark.parametrize("seed", range(5))
def test_many_values_of_every_layout(seed):
    torch.manual_seed(seed)
    values = [
        torch.randn(64, 32, 3, 3).abs().to(memory_format=torch.channels_last),
        torch.randn(100, 200).abs().t(),
        torch.randn(50, 40).abs()[:, ::2],  # with gaps
        torch.randn(1000).abs().mul(8).round().div(8),  # with ties
        torch.zeros(300),
        torch.full((7,), 1e-42),  # subnormal
    ]
    n = sum(part.numel() for part in values)
    for k in (1, 2, n // 10, n // 2, n - 300, n - 299, n):
        assert kth_largest(values, k) == expected(values, k)
        assert select._by_bisection(values, k) == expected(values, k)
