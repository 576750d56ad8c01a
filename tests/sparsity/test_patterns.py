import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsity import NM, GlobalMagnitude, UniformMagnitude


def weights(seed: int = 0, **shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


LAYERS = {"conv": (8, 4, 3, 3), "pointwise": (16, 8, 1, 1), "fc": (10, 16)}


@given(st.floats(0, 0.999), st.integers(1, 200), st.integers(0, 5))
def test_global_keeps_exactly_the_asked_number_of_the_largest(sparsity, size, seed):
    given_weights = weights(seed, a=(size,), b=(7, 3))
    masks = GlobalMagnitude(sparsity)(given_weights)
    flat = torch.cat([w.flatten() for w in given_weights.values()]).abs()
    keep = torch.cat([m.flatten() for m in masks.values()])
    assert keep.sum() == flat.numel() - round(flat.numel() * sparsity)
    if keep.any() and not keep.all():
        assert flat[keep].min() >= flat[~keep].max()


def test_exact_rule_breaks_ties_by_order_over_all_layers():
    masks = GlobalMagnitude(0.5)(
        {"a": torch.tensor([[1.0, -1.0, 1.0]]), "b": torch.tensor([[1.0, 1.0, 2.0]])}
    )
    assert masks["a"].tolist() == [[True, True, False]]
    assert masks["b"].tolist() == [[False, False, True]]


@pytest.mark.parametrize("sparsity", [0.5, 0.75, 0.9])
def test_original_rule_keeps_one_less_than_k(sparsity):
    given_weights = weights(**LAYERS)
    total = sum(w.numel() for w in given_weights.values())
    kept = sum(int(m.sum()) for m in GlobalMagnitude(sparsity, rule="original")(given_weights).values())
    assert kept == math.ceil(total * (1 - sparsity)) - 1


def test_original_rule_drops_all_ties_at_the_threshold():
    masks = UniformMagnitude(0.5, rule="original")({"a": torch.tensor([3.0, 1.0, 1.0, 0.5])})
    assert masks["a"].tolist() == [True, False, False, False]


@given(st.floats(0, 0.99))
def test_uniform_gives_every_layer_the_same_sparsity(sparsity):
    given_weights = weights(**LAYERS)
    for name, mask in UniformMagnitude(sparsity)(given_weights).items():
        size = given_weights[name].numel()
        assert mask.shape == given_weights[name].shape
        assert mask.sum() == size - round(size * sparsity)


@pytest.mark.parametrize("pattern", [GlobalMagnitude(0), UniformMagnitude(0), GlobalMagnitude(0, "original")])
def test_sparsity_zero_keeps_everything(pattern):
    assert all(mask.all() for mask in pattern({"a": torch.zeros(5, 5)}).values())


@pytest.mark.parametrize("pattern", [GlobalMagnitude(0.8), UniformMagnitude(0.8), NM(2, 4)])
def test_masks_do_not_depend_on_sign_or_memory_format(pattern):
    given_weights = weights(**LAYERS)
    expected = pattern(given_weights)
    for other in (
        {name: -w for name, w in given_weights.items()},
        {
            name: w.to(memory_format=torch.channels_last) if w.dim() == 4 else w
            for name, w in given_weights.items()
        },
    ):
        assert all(torch.equal(mask, expected[name]) for name, mask in pattern(other).items())


@pytest.mark.parametrize("rule", ["exact", "original"])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (1, 2), (4, 8)])
def test_nm_keeps_the_n_largest_of_m_input_channels(n, m, rule):
    weight = weights(conv=(6, 16, 3, 3))["conv"]
    mask = NM(n, m, rule)({"conv": weight})["conv"]
    for o, y, x in ((0, 0, 0), (3, 1, 2), (5, 2, 2)):
        for start in range(0, 16, m):
            group = weight[o, start : start + m, y, x].abs()
            keep = mask[o, start : start + m, y, x]
            assert keep.sum() == n
            assert group[keep].min() >= group[~keep].max()


def test_nm_groups_lie_along_in_features_of_linear_layers():
    mask = NM(2, 4)({"fc": torch.tensor([[1.0, 2, 3, 4, 8, 7, 6, 5]])})["fc"]
    assert mask.tolist() == [[False, False, True, True, True, True, False, False]]


@pytest.mark.parametrize(
    ("rule", "kept"), [("exact", [True, True, False, False]), ("original", [False, False, True, True])]
)
def test_nm_rules_differ_in_ties_only(rule, kept):
    assert NM(2, 4, rule)({"fc": torch.ones(1, 4)})["fc"].tolist() == [kept]


def test_nm_names_layers_that_do_not_divide_and_those_no_hardware_can_use():
    with pytest.raises(ValueError, match=r"2:4 sparsity: layer 'odd' has 15 weights, shape \(5, 3\)"):
        NM(2, 4)({"odd": torch.ones(5, 3)})
    stem = {"stem": torch.ones(8, 3, 2, 2), "body": torch.ones(8, 8, 3, 3)}
    assert NM(2, 4).straddling(stem) == ["stem"]
    assert NM(2, 4)(stem)["stem"].sum() == 48  # the paper's grouping goes on over the border


@pytest.mark.parametrize("bad", [1.0, -0.1, 1.5, float("nan")])
def test_sparsity_out_of_range_is_refused(bad):
    for pattern in (GlobalMagnitude, UniformMagnitude):
        with pytest.raises(ValueError, match="0 <= sparsity < 1"):
            pattern(bad)


def test_unknown_rule_and_impossible_nm_are_refused():
    with pytest.raises(ValueError, match="unknown rule 'best'; one of exact, original"):
        GlobalMagnitude(0.5, rule="best")
    for n, m in ((0, 4), (4, 4), (5, 4)):
        with pytest.raises(ValueError, match="0 < n < m"):
            NM(n, m)


def test_double_precision_decides_in_double_precision():
    close = torch.tensor([1.0, 1.0 + 1e-12], dtype=torch.float64)
    assert UniformMagnitude(0.5)({"a": close})["a"].tolist() == [False, True]


def test_the_original_rule_adds_its_small_number_before_it_compares():
    """So weights far below 1e-4 are equal to it, and all of them are dropped with the threshold."""
    weights = {"a": torch.tensor([1.0, 1e-12, 2e-12, 3e-12])}
    kept = GlobalMagnitude(0.25, rule="original")(weights)["a"]
    assert kept.tolist() == [True, False, False, False]
