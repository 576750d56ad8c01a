import pytest
import torch
from torch import nn

from sparsity import (
    ACDC,
    NM,
    CubicSparsity,
    GlobalMagnitude,
    PhaseSchedule,
    RandomMask,
    Regrowth,
    measure,
    num_leaked,
)
from sparsity.gradual import actions_of, settled


@pytest.mark.parametrize(("final", "first"), [(0.4, 1), (0.8, 16), (0.9, 21)])
def test_masks_are_settled_once_the_density_is_near_its_last(final, first):
    gradual = CubicSparsity(0.05, final, start=1, end=40, every=5)
    masks = actions_of(GlobalMagnitude(final), PhaseSchedule.parse("dense 1, sparse 89"), gradual)
    assert settled(masks) == first
    cut_off = actions_of(GlobalMagnitude(final), PhaseSchedule.parse("dense 1, sparse 2"), gradual)
    assert settled(cut_off) == 1  # one compression is all there is
    last = 1 - gradual.at(36)
    assert [1 - gradual.at(epoch) <= 2 * last for epoch in gradual.epochs] == [
        epoch >= first for epoch in gradual.epochs
    ]


def test_the_law_is_constant_outside_its_epochs():
    gradual = CubicSparsity(0.1, 0.9, start=2, end=10)
    assert gradual.at(0) == gradual.at(2) == pytest.approx(0.1)
    assert gradual.at(10) == gradual.at(99) == 0.9


def test_training_with_growing_sparsity():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 5))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    gradual = CubicSparsity(0.05, 0.9, start=1, end=8, every=2)
    schedule = PhaseSchedule.parse("dense 1, sparse 9")
    acdc = ACDC(net, GlobalMagnitude(0.9), schedule, steps_per_epoch=3, gradual=gradual)
    acdc.attach(optimizer)
    kept = {name: mask.clone() for name, mask in acdc.masks().items()}
    for step in range(30):
        acdc.before_step()
        epoch = step // 3
        asked = gradual.at(max(e for e in gradual.epochs if e <= epoch)) if epoch else 0.0
        assert measure(net, acdc.masks()).overall == pytest.approx(asked, abs=1 / 750)
        for name, mask in acdc.masks().items():
            assert not (mask & ~kept[name]).any()  # what is dropped stays dropped
            kept[name] = mask.clone()
        nn.functional.cross_entropy(net(torch.randn(8, 20)), torch.randint(0, 5, (8,))).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert num_leaked(acdc.weights(), acdc.masks()) == 0
    assert acdc.mask_difference == 0  # nothing but the growth


@pytest.mark.parametrize(
    ("pattern", "schedule", "message"),
    [
        (GlobalMagnitude(0.9), "dense 2, sparse 8", "needs a sparse phase that begins there"),
        (GlobalMagnitude(0.9), "dense 1, sparse 2, dense 2", "one sparse phase that lasts to the end"),
        (NM(2, 4), "dense 1, sparse 9", "changes the sparsity of a magnitude pattern"),
    ],
)
def test_what_does_not_fit_is_refused(pattern, schedule, message):
    with pytest.raises(ValueError, match=message):
        ACDC(
            nn.Sequential(nn.Linear(4, 4)),
            pattern,
            PhaseSchedule.parse(schedule),
            1,
            gradual=CubicSparsity(0.05, 0.9, 1, 5),
        )


def test_impossible_laws_are_refused():
    for arguments in ((0.9, 0.5, 1, 5), (0.1, 1.0, 1, 5)):
        with pytest.raises(ValueError, match="0 <= initial <= final < 1"):
            CubicSparsity(*arguments)
    for arguments in ((0.1, 0.5, 5, 5), (0.1, 0.5, 1, 5, 0)):
        with pytest.raises(ValueError, match="0 <= start < end"):
            CubicSparsity(*arguments)


@pytest.mark.parametrize(
    ("pattern", "law"),
    [
        (GlobalMagnitude(0.9), CubicSparsity(0.1, 0.9, 1, 10**12, 2)),
        (RandomMask(0.9), Regrowth(0.3, 10**12, 2)),
    ],
)
def test_masks_change_within_the_schedule_alone(pattern, law):
    assert list(actions_of(pattern, PhaseSchedule.parse("dense 1, sparse 5"), law)) == [1, 3, 5]


def test_a_dense_schedule_masks_nothing():
    net = nn.Sequential(nn.Linear(4, 4))
    acdc = ACDC(net, GlobalMagnitude(0.9), PhaseSchedule.parse("dense 3"), 2)
    acdc.attach(torch.optim.SGD(net.parameters(), lr=0.1))
    for _ in range(6):
        acdc.before_step()
    assert acdc.masks() == {}
    assert type(net[0]) is nn.Linear
    assert measure(net, acdc.masks()).overall == 0
