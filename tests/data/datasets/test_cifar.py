import os
import pickle
import re

import numpy as np
import pytest

from data.datasets import cifar
from data.datasets.cifar import CIFAR10, CIFAR100
from data.datasets.sources import SOURCES
from tests.hostile import Evil


def make_batch(num_images, variant, seed):
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (num_images, 3072), dtype=np.uint8)
    return images, generator.integers(0, variant.num_classes, num_images)


def write_python(root, variant, num_images=20, protocol=2):
    folder = root / variant.python_folder
    folder.mkdir(parents=True)
    for seed, name in enumerate([*variant.python["train"], *variant.python["test"]]):
        images, labels = make_batch(num_images, variant, seed)
        batch = {
            b"batch_label": b"x",
            variant.label_key: labels.tolist(),
            b"data": images,
            b"filenames": [b"a.png"],
        }
        (folder / name).write_bytes(pickle.dumps(batch, protocol))
    return folder


def write_binary(root, variant, num_images=20):
    folder = root / variant.binary_folder
    folder.mkdir(parents=True)
    for seed, name in enumerate([*variant.binary["train"], *variant.binary["test"]]):
        images, labels = make_batch(num_images, variant, seed)
        coarse = np.zeros((num_images, variant.label_bytes - 1), np.uint8)
        records = np.concatenate([coarse, labels[:, None].astype(np.uint8), images], axis=1)
        (folder / name).write_bytes(records.tobytes())
    return folder


@pytest.mark.parametrize("variant", [CIFAR10, CIFAR100], ids=["cifar10", "cifar100"])
@pytest.mark.parametrize("write", [write_python, write_binary])
def test_both_versions_give_the_same(variant, write, tmp_path):
    folder = write(tmp_path, variant)
    train, test = (cifar.load(variant, tmp_path, split) for split in ("train", "test"))
    assert (len(train), len(test)) == (20 * len(variant.binary["train"]), 20)
    assert train.shape == (3, 32, 32)
    last = len(variant.binary["train"])
    images, labels = make_batch(20, variant, last)
    assert np.array_equal(test.labels, labels)
    assert test.images[3, 5, 7].tolist() == [images[3, channel * 1024 + 5 * 32 + 7] for channel in range(3)]
    assert np.array_equal(
        cifar.load(variant, folder, "test").images, test.images
    )  # the folder itself will do


def test_the_home_is_searched_when_no_root_is_given(tmp_path, monkeypatch):
    monkeypatch.setenv("ACDC_DATA", str(tmp_path))
    with pytest.raises(
        FileNotFoundError, match=r"no CIFAR-10 in .*cifar-10-batches-bin or cifar-10-batches-py"
    ):
        SOURCES["cifar10"](None, "train")
    write_python(tmp_path, CIFAR10)
    assert len(SOURCES["cifar10"](None, "train")) == 100


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_nothing_in_a_pickle_is_executed(tmp_path, protocol):
    folder = write_python(tmp_path, CIFAR10)
    target = tmp_path / "executed"
    evil = Evil(os.system, f"touch {target}")
    (folder / "test_batch").write_bytes(pickle.dumps({b"data": evil}, protocol))
    with pytest.raises(ValueError, match=r"test_batch: not a CIFAR-10 batch: it asks for posix\.system"):
        cifar.load(CIFAR10, tmp_path, "test")
    assert not target.exists()


@pytest.mark.parametrize(
    ("write", "name", "damage", "message"),
    [
        (write_python, "test_batch", lambda content: content[: len(content) // 2], "not a CIFAR-10 batch"),
        (write_python, "test_batch", lambda content: b"", "not a CIFAR-10 batch"),
        (write_python, "test_batch", lambda content: pickle.dumps([1, 2]), "holds no uint8 images"),
        (write_binary, "test_batch.bin", lambda content: content[:-1], "61459 bytes are not a whole"),
        (write_binary, "test_batch.bin", lambda content: b"\xff" * 3073, "labels run from 255 to 255"),
    ],
)
def test_damaged_files_are_named(tmp_path, write, name, damage, message):
    path = write(tmp_path, CIFAR10) / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        cifar.load(CIFAR10, tmp_path, "test")


def test_a_missing_part_is_named(tmp_path):
    (write_binary(tmp_path, CIFAR10) / "data_batch_3.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"CIFAR-10 is incomplete: .*data_batch_3\.bin is missing"):
        cifar.load(CIFAR10, tmp_path, "train")


@pytest.mark.parametrize("label", [None, "x", [1], 10**30, 1.5, b"1", 10, -1])
def test_labels_that_are_none_are_named(tmp_path, label):
    write_python(tmp_path, CIFAR10)
    path = tmp_path / CIFAR10.python_folder / "test_batch"
    batch = pickle.loads(path.read_bytes(), encoding="bytes")
    batch[b"labels"][3] = label
    path.write_bytes(pickle.dumps(batch, 2))
    with pytest.raises(
        ValueError, match=f"test_batch: not a CIFAR-10 batch: {re.escape(repr(label))} is no label"
    ):
        cifar.load(CIFAR10, tmp_path, "test")
