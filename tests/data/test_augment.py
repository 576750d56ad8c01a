"""RandAugment and TrivialAugment as torchvision has them, drawn by place, and the same on both backends."""

import itertools

import numpy as np
import pytest
import torch

from data.augment import BINS, OPERATIONS, Augment, apply, apply_to_batch
from data.crops import CropStream
from data.stream import TrainStream
from data.torchvision_import import import_transforms
from tests.data.photographs import photograph

LAWS = {"trivial": Augment("trivial"), "rand": Augment("rand", 2, 9)}


def pixels(number, width, height, channels=3):
    """A photograph as the backends have it: uint8, (channels, height, width), channels last in memory."""
    image = torch.from_numpy(np.array(photograph(number, width, height))).permute(2, 0, 1)
    return image[:channels]


def torchvisions(monkeypatch, law, operations, levels):
    """torchvision's own class, which draws our numbers."""
    v2, drawn = import_transforms(), iter(zip(operations, levels, strict=True))
    level = 0

    def randint(high, size):
        nonlocal level
        if high == len(OPERATIONS):
            operation, level = (int(number) for number in next(drawn))
            return torch.tensor(operation)
        assert high == BINS
        return torch.tensor(abs(level))

    monkeypatch.setattr(torch, "randint", randint)
    monkeypatch.setattr(torch, "rand", lambda size: torch.tensor(0.4 if level < 0 else 0.6))
    if law.law == "trivial":
        return v2.TrivialAugmentWide()
    return v2.RandAugment(num_ops=law.num_ops, magnitude=law.magnitude)


def test_operations_and_order_are_torchvisions():
    v2 = import_transforms()
    for theirs in (v2.TrivialAugmentWide, v2.RandAugment):
        assert tuple(theirs._AUGMENTATION_SPACE) == OPERATIONS


SHAPES = ((3, 48, 48), (3, 20, 28), (1, 28, 28))  # channels, height, width


def differing(monkeypatch, law, bins, shapes):
    """Of every operation with these bins and both signs, and of pairs of operations: where we differ."""
    found = []
    for operation, bin_, sign in itertools.product(range(len(OPERATIONS)), bins, (1, -1)):
        augment = Augment(law, 1 if law == "trivial" else 2, bin_ if law == "rand" else 0)
        operations = np.array([operation, (operation + bin_) % len(OPERATIONS)][: augment.num_ops], np.int32)
        levels = np.full(augment.num_ops, sign * bin_, np.int32)
        for channels, height, width in next(shapes):
            image = pixels(3, width, height, channels)
            with monkeypatch.context() as patched:
                theirs = torchvisions(patched, augment, operations, levels)(image.contiguous())
            ours = apply(image, operations, augment.magnitudes(operations, levels, height, width))
            if not torch.equal(ours, theirs):
                found.append((OPERATIONS[operation], bin_, sign, channels, height, width))
    return found


@pytest.mark.parametrize("law", LAWS)
def test_pixels_are_torchvisions(monkeypatch, law):
    one_by_one = ((shape,) for shape in itertools.cycle(SHAPES))
    assert not differing(monkeypatch, law, (9, 30), one_by_one)


@pytest.mark.rare
@pytest.mark.parametrize("law", LAWS)
def test_pixels_are_torchvisions_with_every_bin(monkeypatch, law):
    assert not differing(monkeypatch, law, range(BINS), itertools.repeat(SHAPES))


def test_a_batch_is_its_images_one_by_one():
    images = torch.stack([pixels(i, 32, 32).permute(1, 2, 0) for i in range(40)]).permute(0, 3, 1, 2)
    augment = LAWS["rand"]
    operations, levels = augment.draw(np.random.default_rng(3), len(images))
    magnitudes = augment.magnitudes(operations, levels, 32, 32)
    expected = [apply(image, *drawn) for image, *drawn in zip(images, operations, magnitudes, strict=True)]
    before = images.clone()
    apply_to_batch(images, operations, magnitudes)
    assert torch.equal(images, torch.stack(expected))
    assert not torch.equal(images, before)
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_draws_follow_the_law():
    """Operations, bins and signs evenly and independently; RandAugment's one bin."""
    operations, levels = Augment("trivial").draw(np.random.default_rng(1), 100_000)
    assert operations.shape == levels.shape == (100_000, 1)
    shares = np.bincount(operations[:, 0], minlength=len(OPERATIONS)) / len(operations)
    assert shares == pytest.approx(np.full(len(OPERATIONS), 1 / 14), abs=0.005)
    bins = np.bincount(np.abs(levels[:, 0]), minlength=BINS) / len(levels)
    assert bins == pytest.approx(np.full(BINS, 1 / 31), abs=0.004)
    assert (levels > 0).mean() == pytest.approx(0.5 * 30 / 31, abs=0.01)
    assert abs(np.corrcoef(operations[:, 0], levels[:, 0])[0, 1]) < 0.02
    operations, levels = Augment("rand", 3, 7).draw(np.random.default_rng(1), 100_000)
    assert operations.shape == (100_000, 3)
    assert set(levels.ravel().tolist()) == {-7, 7}
    assert np.abs(np.corrcoef(operations.T) - np.eye(3)).max() < 0.02


@pytest.mark.parametrize("kind", [TrainStream, CropStream])
def test_draws_belong_to_places_and_change_no_other(kind):
    def make(augment=LAWS["rand"], **arguments):
        return kind(50, 12, seed=3, flip=True, augment=augment, **arguments)

    for step in range(5):
        whole, plain = make().draw(1, step), make(None).draw(1, step)
        parts = [make(rank=rank, world_size=2).draw(1, step) for rank in range(2)]
        for field in ("operations", "levels"):
            together = np.concatenate([getattr(part, field) for part in parts])
            assert np.array_equal(together, getattr(whole, field))
            assert getattr(whole, field).shape == (12, 2)
            assert getattr(plain, field).shape == (12, 0)
        same = set(whole._fields) - {"operations", "levels"}
        assert all(np.array_equal(getattr(whole, field), getattr(plain, field)) for field in same)
    drawn = {make().draw(*place).operations.tobytes() for place in itertools.product(range(3), range(3))}
    assert len(drawn) == 9


def test_the_fingerprint_tells_laws_apart():
    laws = (None, LAWS["trivial"], LAWS["rand"], Augment("rand", 3, 9), Augment("rand", 2, 10))
    found = [TrainStream(50, 12, seed=3, augment=law).fingerprint() for law in laws]
    assert len({str(each) for each in found}) == len(laws)
    assert "augment" not in found[0]  # checkpoints from before go on
