import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.stream import EvalStream, TrainStream


def epoch_of(make, epoch, world_size, micro_batches=1):
    """The global batches of an epoch: per step, the draws of all ranks and micro-batches put together."""
    ranks = [
        make(rank=rank, world_size=world_size, micro_batches=micro_batches) for rank in range(world_size)
    ]
    for step in range(ranks[0].batches_per_epoch // micro_batches):
        draws = [
            rank.draw(epoch, step * micro_batches + micro) for micro in range(micro_batches) for rank in ranks
        ]
        yield [np.concatenate(parts) for parts in zip(*draws, strict=True)]


def make(num_images=50, **arguments):
    return TrainStream(num_images, global_batch=12, seed=3, crop_padding=4, flip=True, **arguments)


@pytest.mark.parametrize(("world_size", "micro_batches"), [(2, 1), (1, 3), (2, 2), (4, 3)])
def test_the_global_batch_does_not_depend_on_how_it_is_shared(world_size, micro_batches):
    alone = list(epoch_of(make, 5, 1))
    shared = list(epoch_of(make, 5, world_size, micro_batches))
    assert len(alone) == len(shared) == 5
    for one, many in zip(alone, shared, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, many, strict=True))


def counting(make, epoch, world_size, micro_batches=1):
    batches = epoch_of(make, epoch, world_size, micro_batches)
    return np.concatenate([indices[counts] for indices, counts, *_ in batches])


@given(st.integers(12, 100), st.sampled_from([1, 2, 4]), st.sampled_from([1, 3]))
def test_every_image_counts_exactly_once_an_epoch(num_images, world_size, micro_batches):
    seen = counting(lambda **a: make(num_images, **a), 2, world_size, micro_batches)
    assert sorted(seen) == list(range(num_images))


def test_repeats_of_its_own_images_fill_up_the_last_batch():
    indices, counts, *_ = list(epoch_of(make, 0, 1))[-1]
    assert counts.tolist() == [True] * 2 + [False] * 10
    assert indices.tolist() == indices[:2].tolist() * 6


def test_epochs_differ():
    epochs = [counting(make, epoch, 1) for epoch in range(3)]
    assert not np.array_equal(epochs[0], epochs[1])
    other_seed = counting(lambda **a: TrainStream(50, 12, seed=4, **a), 0, 1)
    assert not np.array_equal(epochs[0], other_seed)


def test_augmentation_differs_from_step_to_step_and_from_epoch_to_epoch():
    stream = make()
    draws = [stream.draw(epoch, step) for epoch in range(3) for step in range(3)]
    together = {draw.shift.tobytes() + draw.flip.tobytes() for draw in draws}
    assert len(together) == len(draws)
    assert len({draw.flip.tobytes() for draw in draws}) > 3  # of the three steps' if epochs drew the same


def test_augmentation_covers_its_range_and_is_off_by_default():
    draws = [make(num_images=1200).draw(0, index) for index in range(100)]
    shifts = np.concatenate([draw.shift for draw in draws])
    assert (shifts.min(), shifts.max()) == (-4, 4)
    assert np.concatenate([draw.flip for draw in draws]).mean() == pytest.approx(0.5, abs=0.05)
    plain = TrainStream(50, 12, seed=3).draw(0, 0)
    assert not plain.shift.any()
    assert not plain.flip.any()


@given(st.integers(1, 100), st.integers(1, 20), st.integers(1, 4))
def test_evaluation_sees_every_image_exactly_once(num_images, batch_size, world_size):
    ranks = [EvalStream(num_images, batch_size, rank, world_size) for rank in range(world_size)]
    draws = [rank.draw(0, index) for rank in ranks for index in range(rank.batches_per_epoch)]
    assert all(len(draw.indices) == batch_size for draw in draws)
    indices = np.concatenate([draw.indices[draw.counts] for draw in draws])
    assert sorted(indices) == list(range(num_images))


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_every_step_of_an_evaluation(world_size):
    ranks = [EvalStream(50, 4, rank, world_size) for rank in range(world_size)]
    alone = EvalStream(50, 4 * world_size)
    assert {rank.batches_per_epoch for rank in ranks} == {alone.batches_per_epoch}
    for index in range(alone.batches_per_epoch):
        parts = zip(*(rank.draw(0, index) for rank in ranks), strict=True)
        for together, whole in zip(parts, alone.draw(0, index), strict=True):
            assert np.array_equal(np.concatenate(together), whole)


def test_batches_that_do_not_divide_and_sets_that_are_too_small_are_refused():
    with pytest.raises(ValueError, match="12 does not divide by 5 devices x 1 accumulation steps"):
        make(world_size=5)
    with pytest.raises(ValueError, match="11 training images are fewer than one batch of 12"):
        make(num_images=11)
