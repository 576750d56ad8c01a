"""Random masks and their regrowth: the baselines that no magnitude chooses."""

import pytest
import torch
from torch import nn

from sparsity import ACDC, GlobalMagnitude, PhaseSchedule, RandomMask, Regrowth, num_leaked
from sparsity.patterns.random import DropAndGrow, num_kept

SHAPES = {"conv1": (16, 3, 3, 3), "conv2": (64, 64, 3, 3), "conv3": (64, 32, 1, 1), "conv4": (128, 64, 3, 3)}


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def test_densities_follow_the_law_of_erdos_renyi_kernels():
    """Of layers that are not dense, densities are as the sums of dimensions over their products."""
    kept, given = num_kept(weights(), 0.9), weights()
    assert sum(kept.values()) == pytest.approx(0.1 * sum(w.numel() for w in given.values()), abs=3)
    assert kept["conv1"] == given["conv1"].numel()  # its share would be above 1
    ratio = (kept["conv2"] / given["conv2"].numel()) / (kept["conv4"] / given["conv4"].numel())
    assert ratio == pytest.approx((64 + 64 + 6) / (64 * 64 * 9) / ((128 + 64 + 6) / (128 * 64 * 9)), rel=0.01)


def test_the_draw_is_the_seeds_alone():
    first, again, other = (RandomMask(0.9, seed)(weights(k)) for seed, k in ((3, 0), (3, 1), (4, 0)))
    assert all(torch.equal(first[name], again[name]) for name in SHAPES)
    assert not torch.equal(first["conv2"], other["conv2"])
    assert {name: int(mask.sum()) for name, mask in first.items()} == num_kept(weights(), 0.9)


def test_an_update_drops_the_smallest_and_grows_what_was_dropped():
    before = RandomMask(0.9, 0)(weights())
    trained = {name: weight * before[name] for name, weight in weights(1).items()}
    after = DropAndGrow(0.9, 0.25, 7)(trained)
    old, new = before["conv2"], after["conv2"]
    changed = round(0.25 * int(old.sum()))
    assert new.sum() == old.sum()
    assert (new & ~old).sum() == (old & ~new).sum() == changed
    magnitudes = trained["conv2"].abs()
    assert magnitudes[old & ~new].max() <= magnitudes[old & new].min()
    assert torch.equal(after["conv1"], before["conv1"])  # it is dense
    again = DropAndGrow(0.9, 0.25, 7)(trained)
    assert all(torch.equal(after[name], again[name]) for name in SHAPES)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_training_with_regrowth(optimizer):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 5))
    schedule, law = PhaseSchedule.parse("sparse 8"), Regrowth(0.3, end=6)
    acdc = ACDC(net, RandomMask(0.8, 1), schedule, steps_per_epoch=4, gradual=law)
    trained = optimizer(net.parameters(), lr=0.01)
    acdc.attach(trained)
    shares, masks = [], None
    for step in range(32):
        acdc.before_step()
        if masks is not None and step % 4 == 0:
            now, then = acdc.masks()["0"], masks["0"]
            shares.append(((now & ~then).sum() / now.sum()).item())
            grown = now & ~then
            assert not acdc.weights()["0"][grown].any()  # from 0
        masks = {name: mask.clone() for name, mask in acdc.masks().items()}
        before = acdc.weights()["0"].clone()
        nn.functional.cross_entropy(net(torch.randn(8, 20)), torch.randint(0, 5, (8,))).backward()
        trained.step()
        trained.zero_grad()
        assert num_leaked(acdc.weights(), acdc.masks()) == 0
        assert (acdc.weights()["0"] - before).abs().max() < 0.05  # grown weights leap no further than others
    asked = [law.at(epoch, 0) for epoch in range(1, 6)]
    assert shares == pytest.approx([*asked, 0, 0], abs=0.02)
    assert asked[0] > asked[-1] > 0


@pytest.mark.parametrize(
    ("pattern", "schedule", "law", "message"),
    [
        (GlobalMagnitude(0.9), "sparse 9", Regrowth(0.3, 5), "goes on from a random mask"),
        (RandomMask(0.9), "dense 1, sparse 2, dense 2", Regrowth(0.3, 4), "one sparse phase that lasts"),
        (RandomMask(0.9), "dense 6, sparse 2", Regrowth(0.3, 6), "must end behind epoch 6"),
    ],
)
def test_what_does_not_fit_is_refused(pattern, schedule, law, message):
    net = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match=message):
        ACDC(net, pattern, PhaseSchedule.parse(schedule), 1, gradual=law)


def test_impossible_laws_are_refused():
    with pytest.raises(ValueError, match="0 < share < 1"):
        Regrowth(1.0, 5)
    with pytest.raises(ValueError, match="1 or more"):
        Regrowth(0.3, 5, every=0)
    with pytest.raises(ValueError, match="share of weights to drop"):
        RandomMask(1.0)
