import itertools

import numpy as np
import pytest
import torch

from data.dali.arrays import DaliArrayLoader
from data.datasets import fashion_mnist
from data.datasets.arrays import ImageArrays
from data.loader import PADDING_LABEL
from data.stream import EvalStream, TrainStream

pytest.importorskip("nvidia.dali", reason="DALI is not installed")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def colour() -> ImageArrays:
    """Real pixels as three-channel images that are not square."""
    grey = fashion_mnist.load(None, "test")
    images = np.concatenate([grey.images[:300], grey.images[300:600], grey.images[600:900]], axis=3)[:, :20]
    return ImageArrays(images, grey.labels[:300], 10, (0.5,) * 3, (0.5,) * 3, "test")


def train_stream(arrays, **arguments):
    return TrainStream(len(arrays), 32, seed=7, crop_padding=4, flip=True, **arguments)


def expected(arrays, draw):
    """What padding, cropping and flipping mean, written with numpy alone."""
    _, height, width = arrays.shape
    padded = np.pad(arrays.images[draw.indices], ((0, 0), (4, 4), (4, 4), (0, 0)))
    images = []
    for image, (down, right), flip in zip(padded, draw.shift, draw.flip, strict=True):
        crop = image[4 + down : 4 + down + height, 4 + right : 4 + right + width]
        images.append(crop[:, ::-1] if flip else crop)
    return np.stack(images)


def test_pixels_labels_and_layout(colour):
    stream = train_stream(colour)
    loader = DaliArrayLoader(colour, stream, CPU)
    batches = list(loader.epoch(2))
    assert len(batches) == loader.batches_per_epoch == 10
    for index, (images, labels) in enumerate(batches):
        draw = stream.draw(2, index)
        assert images.shape == (32, 3, 20, 28)
        assert images.dtype == torch.uint8
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert np.array_equal(images.permute(0, 2, 3, 1), expected(colour, draw))
        assert np.array_equal(labels[draw.counts], colour.labels[draw.indices[draw.counts]])
        assert (labels[~draw.counts] == PADDING_LABEL).all()


def test_batches_stay_as_they_are_while_the_pipeline_goes_on(colour):
    loader = DaliArrayLoader(colour, train_stream(colour), CPU)
    kept = [(images, images.clone()) for images, _ in loader.epoch(0)]
    list(itertools.chain.from_iterable(loader.epoch(epoch) for epoch in range(1, 4)))
    assert all(torch.equal(now, then) for now, then in kept)


@pytest.mark.parametrize(("epoch", "start"), [(0, 0), (0, 8), (3, 5)])
def test_any_position_can_be_started_from(colour, epoch, start):
    through = DaliArrayLoader(colour, train_stream(colour), CPU)
    for earlier in range(epoch):
        list(through.epoch(earlier))
    whole = list(through.epoch(epoch))[start:]
    resumed = list(DaliArrayLoader(colour, train_stream(colour), CPU).epoch(epoch, start))
    assert len(whole) == len(resumed) == 10 - start
    for a, b in zip(whole, resumed, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)


def test_an_abandoned_epoch_can_be_followed_by_any(colour):
    loader = DaliArrayLoader(colour, train_stream(colour), CPU)
    first = next(iter(loader.epoch(0)))
    again = next(iter(loader.epoch(0)))
    assert torch.equal(first.images, again.images)


def test_evaluation_pads_its_last_batch(colour):
    loader = DaliArrayLoader(colour, EvalStream(len(colour), 128), CPU)
    for epoch in range(2):
        labels = torch.cat([batch.labels for batch in loader.epoch(epoch)])
        assert len(labels) == 3 * 128
        assert np.array_equal(labels[:300], colour.labels)
        assert (labels[300:] == PADDING_LABEL).all()


def test_the_fingerprint_tells_streams_apart(colour):
    def fingerprint(stream, arrays=colour):
        return DaliArrayLoader(arrays, stream, CPU).fingerprint()

    same = fingerprint(train_stream(colour))
    assert same == fingerprint(train_stream(colour, world_size=2, rank=1))
    assert same != fingerprint(TrainStream(len(colour), 32, seed=8, crop_padding=4, flip=True))
    darker = ImageArrays(colour.images // 2, colour.labels, 10, colour.mean, colour.std, "test")
    assert same != fingerprint(train_stream(darker), darker)
