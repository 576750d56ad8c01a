"""Packed images through DALI's readers: every image once, exact positions, damaged states."""

import itertools
import shutil
import struct
import tarfile

import numpy as np
import pytest
import torch

from data.crops import CropStream
from data.dali_records import DaliRecordLoader, count_records
from data.image_files import load_image_files
from data.loader import PADDING_LABEL
from data.records import find_records
from data.shards import write_shards
from data.stream import EvalStream
from tests.data.photographs import make_tree

pytest.importorskip("nvidia.dali", reason="DALI is not installed")
CPU = torch.device("cpu")
FORMATS = ("webdataset", "tfrecord", "recordio")


def varint(number):
    out = bytearray()
    while number >= 128:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def field(number, payload):
    return varint(number << 3 | 2) + varint(len(payload)) + payload


def example(image, label):
    """A tf.train.Example, written by hand: {"image/encoded": bytes, "image/class/label": int64}."""
    features = (
        ("image/encoded", field(1, field(1, image))),
        ("image/class/label", field(3, field(1, varint(label)))),
    )
    entries = b"".join(field(1, field(1, key.encode()) + field(2, value)) for key, value in features)
    return field(1, entries)


def write_tfrecords(files, folder):
    """Two files; checksums are zeros, which DALI does not look at."""
    folder.mkdir(parents=True)
    for part in range(2):
        path, offset, index = folder / f"train.tfrecord-0000{part}-of-00002", 0, []
        with path.open("wb") as out:
            for i in range(part, len(files), 2):
                data = example((files.root / files.files[i]).read_bytes(), int(files.labels[i]) + 1)
                record = struct.pack("<QI", len(data), 0) + data + bytes(4)
                out.write(record)
                index.append(f"{offset} {len(record)}\n")
                offset += len(record)
        path.with_name(path.name + ".idx").write_text("".join(index))


def write_recordio(files, folder):
    folder.mkdir(parents=True)
    index, offset = [], 0
    with (folder / "data.rec").open("wb") as out:
        for i, file in enumerate(files.files):
            data = struct.pack("<IfQQ", 0, float(files.labels[i]), i, 0) + (files.root / file).read_bytes()
            out.write(struct.pack("<II", 0xCED7230A, len(data)) + data + bytes(-len(data) % 4))
            index.append(f"{i}\t{offset}\n")
            offset += 8 + len(data) + (-len(data) % 4)
    (folder / "data.idx").write_text("".join(index))


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    root = tmp_path_factory.mktemp("packed")
    tree = make_tree(root / "tree", 3, 15, 5)  # 45 training images, 15 others
    for split, folder in (("train", "train"), ("test", "val")):
        files = load_image_files(tree, split)
        write_shards(
            files, root / "webdataset" / folder, shard_bytes=60_000, seed=1, workers=1, on_progress=print
        )
        write_tfrecords(files, root / "tfrecord" / folder)
        write_recordio(files, root / "recordio" / folder)
    return root


def train(packed, kind, **arguments):
    records = find_records(packed / kind, "train", kind)
    assert count_records(records) == 45
    stream = CropStream(45, 8, seed=5, flip=True, sizes=((0, 24), (1, 32)), **arguments)
    return DaliRecordLoader(records, stream, CPU, 2, "cpu", 3, int(kind == "tfrecord"))


def equal(a, b):
    return torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)


@pytest.mark.parametrize("kind", FORMATS)
def test_epochs(packed, kind):
    loader = train(packed, kind)
    epochs = [list(loader.epoch(epoch)) for epoch in range(2)]
    assert [len(batches) for batches in epochs] == [5, 5]
    for batches, side in zip(epochs, (24, 32), strict=True):
        for images, labels in batches:
            assert images.shape == (8, 3, side, side)
            assert images.is_contiguous(memory_format=torch.channels_last)
            assert images.dtype == torch.uint8
            assert labels.dtype == torch.int64
        counts = torch.bincount(torch.cat([batch.labels for batch in batches]), minlength=3)
        assert counts.sum() == 40
        assert counts.max() <= 15
    labels = [torch.cat([batch.labels for batch in batches]) for batches in epochs]
    assert not torch.equal(*labels)  # another order


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_sees_every_image_once(packed, kind, world_size):
    """Told apart by their pixels."""
    seen = []
    for rank in range(world_size):
        stream = EvalStream(15, 4, rank, world_size)
        records = find_records(packed / kind, "test", kind)
        loader = DaliRecordLoader(records, stream, CPU, 2, "cpu", 3, int(kind == "tfrecord"), (64, 56))
        for epoch in range(2):
            batches = list(loader.epoch(epoch))
            assert len(batches) == stream.batches_per_epoch
            if epoch:
                seen += [
                    (int(label), image.numpy().tobytes())
                    for images, labels in batches
                    for image, label in zip(images, labels, strict=True)
                    if label != PADDING_LABEL
                ]
    assert len(seen) == len(set(seen)) == 15
    assert sorted(label for label, _ in seen) == [0] * 5 + [1] * 5 + [2] * 5


@pytest.mark.parametrize("kind", FORMATS)
def test_positions_with_and_without_a_state(packed, kind):
    """What follows is the same bit for bit, whether DALI's state is at hand or the epoch is read up to
    there."""
    random = np.random.default_rng(0)
    for shard in ({}, {"rank": 1, "world_size": 2}):
        through, whole, states = train(packed, kind, **shard), [], {}
        for epoch in range(3):
            for index, batch in enumerate(through.epoch(epoch)):
                whole.append((epoch, index, batch))
                states[through.position] = through.state()
        for stop in random.choice(15, 20):
            epoch, index, _ = whole[stop]
            for known in (True, False):
                resumed = train(packed, kind, **shard)
                if known:
                    resumed.load_state(states.get((epoch, index), {}))
                for k, batch in enumerate(resumed.epoch(epoch, index)):
                    assert equal(batch, whole[stop + k][2]), (epoch, index, known, k)


def test_ranks_share_the_images(packed):
    seen = []
    for rank in range(2):
        loader = train(packed, "webdataset", rank=rank, world_size=2)
        seen += list(itertools.chain.from_iterable(batch.labels.tolist() for batch in loader.epoch(0)))
    assert len(seen) == 40
    assert max(seen.count(label) for label in range(3)) <= 15


def test_a_damaged_state_is_refused(packed):
    loader = train(packed, "webdataset")
    next(iter(loader.epoch(0)))
    state = loader.state()
    state["dali"][7] ^= 1
    with pytest.raises(ValueError, match="state is damaged"):
        train(packed, "webdataset").load_state(state)


def test_what_is_wrong_is_said(packed, tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        find_records(tmp_path, "train", "tfrecord")
    (tmp_path / "train").mkdir()
    with pytest.raises(FileNotFoundError, match=r"holds no \*\.rec: is data\.format=recordio right"):
        find_records(tmp_path, "train", "recordio")
    (tmp_path / "train" / "a.tar").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"missing, .*a\.idx first; wds2idx makes them"):
        find_records(tmp_path, "train", "webdataset")
    (tmp_path / "train" / "a.idx").write_text("nonsense\n")
    with pytest.raises(ValueError, match=str(tmp_path)):
        count_records(find_records(tmp_path, "train", "webdataset"))


def test_fingerprints_tell_sets_and_shares_apart(packed):
    ours = train(packed, "webdataset").fingerprint()
    assert ours == train(packed, "webdataset").fingerprint()
    assert ours != train(packed, "tfrecord").fingerprint()
    assert ours != train(packed, "webdataset", rank=0, world_size=2).fingerprint()


def test_labels_that_cannot_be_and_images_that_are_none(packed, tmp_path):
    records = find_records(packed / "tfrecord", "train", "tfrecord")
    stream = CropStream(45, 8, seed=5, sizes=((0, 24),))
    for classes, first in ((3, 0), (3, 2)):  # the files count from 1
        with pytest.raises(OSError, match=r"holds labels from 1 to 3, .* see data\.first_label"):
            list(DaliRecordLoader(records, stream, CPU, 2, "cpu", classes, first).epoch(0))
    shutil.copytree(packed / "webdataset" / "train", tmp_path / "train")
    tar = min((tmp_path / "train").glob("*.tar"))
    content = bytearray(tar.read_bytes())
    with tarfile.open(tar) as members:
        for image in members.getmembers()[::2]:
            content[image.offset_data : image.offset_data + 300] = bytes(300)
    tar.write_bytes(content)
    records = find_records(tmp_path, "train", "webdataset")
    with pytest.raises(OSError, match=r"cannot be decoded: .*; pack the images again"):
        list(DaliRecordLoader(records, stream, CPU, 2, "cpu", 3).epoch(0))
