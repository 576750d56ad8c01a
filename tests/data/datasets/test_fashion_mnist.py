import random

import numpy as np
import pytest

from data.datasets import fashion_mnist
from data.datasets.arrays import ImageArrays
from data.datasets.idx import IDX_FILES
from tests.conftest import write_fashion_idx


def test_bundled_subset():
    train, test = (fashion_mnist.load(None, split) for split in ("train", "test"))
    assert (len(train), len(test)) == (12_000, 2_000)
    assert train.shape == (1, 28, 28)
    assert np.bincount(train.labels).tolist() == [1200] * 10
    assert np.bincount(test.labels).tolist() == [200] * 10
    assert train.labels[:5].tolist() == [9, 0, 0, 3, 0]  # the original's order
    assert fashion_mnist.BUNDLED.stat().st_size < 8_000_000
    assert train.images.mean() / 255 == pytest.approx(fashion_mnist.MEAN[0], abs=2e-3)
    assert train.images.std() / 255 == pytest.approx(fashion_mnist.STD[0], abs=2e-3)


def test_a_given_folder_comes_first_then_the_prepared_set(tiny_data, tmp_path, monkeypatch):
    monkeypatch.setenv("ACDC_DATA", str(tmp_path))
    assert len(fashion_mnist.load(None, "test")) == 2_000
    stored = fashion_mnist.prepare(tiny_data, tmp_path)
    assert stored == tmp_path / "fashion-mnist" / fashion_mnist.ARCHIVE
    prepared = fashion_mnist.load(None, "test")
    assert len(prepared) == 150
    assert prepared.source == str(stored)
    for root in (tiny_data, stored.parent):
        given = fashion_mnist.load(root, "train")
        assert np.array_equal(given.images, fashion_mnist.load(None, "train").images)


def test_missing_and_damaged_sets_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no Fashion-MNIST .*train-images-idx3-ubyte"):
        fashion_mnist.load(tmp_path, "train")
    (tmp_path / fashion_mnist.ARCHIVE).write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(ValueError, match="not a complete Fashion-MNIST archive"):
        fashion_mnist.load(tmp_path, "train")


def test_every_flipped_bit_of_an_archive_is_told_or_harmless(tiny_data, tmp_path):
    stored = fashion_mnist.prepare(tiny_data, tmp_path)
    whole, generator = stored.read_bytes(), random.Random(0)
    right, refusals = fashion_mnist.load(stored.parent, "train").images, []
    for _ in range(200):
        content = bytearray(whole)
        content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        stored.write_bytes(content)
        try:
            images = fashion_mnist.load(stored.parent, "train").images
        except ValueError as error:
            refusals.append(str(error))
            continue
        assert np.array_equal(images, right)
    assert len(refusals) > 50
    assert all(str(stored) in refusal for refusal in refusals)


def test_a_failed_preparation_leaves_what_was_there(tiny_data, tmp_path):
    stored = fashion_mnist.prepare(tiny_data, tmp_path)
    before = stored.read_bytes()
    broken = write_fashion_idx(tmp_path / "broken", 32, 16)
    labels = broken / IDX_FILES["train_labels"]
    labels.write_bytes(labels.read_bytes()[:-1] + bytes([77]))
    with pytest.raises(ValueError, match=r"labels run from 0 to 77, not within 0 \.\. 9"):
        fashion_mnist.prepare(broken, tmp_path)
    assert stored.read_bytes() == before
    assert [path.name for path in stored.parent.iterdir()] == [stored.name]


def test_arrays_check_themselves():
    images, labels = np.zeros((4, 2, 2, 1), np.uint8), np.zeros(4, np.int64)
    ok = ImageArrays(images, labels, 10, (0.5,), (0.5,), "here")
    assert len(ok.digest) == 64
    for bad_images, bad_labels in (
        (images[:3], labels),
        (images[..., 0], labels),
        (images.astype(np.float32), labels),
        (images, labels.astype(np.int32)),
        (images, labels - 1),
        (images[:0], labels[:0]),
    ):
        with pytest.raises(ValueError, match=r"^here: "):
            ImageArrays(bad_images, bad_labels, 10, (0.5,), (0.5,), "here")
