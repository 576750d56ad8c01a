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
    assert len(alone) == len(shared) == 4
    for one, many in zip(alone, shared, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, many, strict=True))


def test_an_epoch_has_no_image_twice_and_epochs_differ():
    epochs = [np.concatenate([batch[0] for batch in epoch_of(make, epoch, 1)]) for epoch in range(3)]
    for indices in epochs:
        assert len(np.unique(indices)) == 48  # 50 // 12 * 12
    assert not np.array_equal(epochs[0], epochs[1])
    other_seed = np.concatenate([b[0] for b in epoch_of(lambda **a: TrainStream(50, 12, seed=4, **a), 0, 1)])
    assert not np.array_equal(epochs[0], other_seed)


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
    indices = np.concatenate([draw.indices for draw in draws])
    assert sorted(indices[indices >= 0]) == list(range(num_images))


def test_batches_that_do_not_divide_and_sets_that_are_too_small_are_refused():
    with pytest.raises(ValueError, match="12 does not divide by 5 devices x 1 accumulation steps"):
        make(world_size=5)
    with pytest.raises(ValueError, match="11 training images are fewer than one batch of 12"):
        make(num_images=11)
