"""Packed images through DALI's readers: every image once, exact positions, damaged states."""

import io
import itertools
import shutil
import struct
import tarfile

import numpy as np
import pytest
import torch

from data.crops import CropStream
from data.dali.records import DaliRecordLoader, count_records
from data.images.files import load_image_files
from data.images.records import find_records
from data.images.shards import write_shards
from data.loader import PADDING_LABEL
from data.stream import EvalStream
from tests.conftest import refuse
from tests.data.photographs import make_tree
from tests.slow import slow

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


def train(packed, kind, on_bad=refuse, **arguments):
    records = find_records(packed / kind, "train", kind)
    assert count_records(records) == 45
    stream = CropStream(45, 8, seed=5, flip=True, sizes=((0, 24), (1, 32)), **arguments)
    return DaliRecordLoader(records, 3, int(kind == "tfrecord"), stream, CPU, 2, "cpu", on_bad)


def equal(a, b):
    return torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)


@pytest.mark.parametrize("kind", FORMATS)
def test_epochs(packed, kind):
    loader = train(packed, kind)
    epochs = [list(loader.epoch(epoch)) for epoch in range(2)]
    assert [len(batches) for batches in epochs] == [6, 6]
    for batches, side in zip(epochs, (24, 32), strict=True):
        for images, labels in batches:
            assert images.shape == (8, 3, side, side)
            assert images.is_contiguous(memory_format=torch.channels_last)
            assert images.dtype == torch.uint8
            assert labels.dtype == torch.int64
        counting = [image for batch in batches for image in batch.images[batch.labels != PADDING_LABEL]]
        assert len({image.numpy().tobytes() for image in counting}) == 45
        labels = torch.cat([batch.labels for batch in batches])
        assert torch.bincount(labels + 1).tolist() == [3, 15, 15, 15]  # padding first
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
        first = int(kind == "tfrecord")
        loader = DaliRecordLoader(records, 3, first, stream, CPU, 2, "cpu", refuse, (64, 56))
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


@pytest.mark.parametrize("kind", [FORMATS[0], *slow(*FORMATS[1:])])
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
        for stop in random.choice(18, 8, replace=False).tolist():
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
    assert [seen.count(label) for label in (PADDING_LABEL, 0, 1, 2)] == [3, 15, 15, 15]


def test_a_damaged_state_is_refused(packed):
    loader = train(packed, "webdataset")
    next(iter(loader.epoch(0)))
    state = loader.state()
    state["dali"][7] ^= 1
    with pytest.raises(ValueError, match="state is damaged"):
        train(packed, "webdataset").load_state(state)


def test_what_is_wrong_is_said(tmp_path):
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


def test_labels_that_cannot_be(packed):
    records = find_records(packed / "tfrecord", "train", "tfrecord")
    stream = CropStream(45, 8, seed=5, sizes=((0, 24),))
    for classes, first in ((3, 0), (3, 2)):  # the files count from 1
        with pytest.raises(OSError, match=r"holds labels from 1 to 3, .* see data\.first_label"):
            list(DaliRecordLoader(records, classes, first, stream, CPU, 2, "cpu", refuse).epoch(0))


@pytest.mark.parametrize("label", [b"x", b"", b"9" * 40])
def test_labels_that_are_no_numbers(label, tmp_path):
    """In the middle of a run: an OSError ends it with a message."""
    (tmp_path / "train").mkdir()
    with tarfile.open(tmp_path / "train" / "0.tar", "w") as tar:
        for name, content in (("0.jpg", b"no picture"), ("0.cls", label)):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    index = f"v1.2 1\njpg 512 10 0.jpg cls 1536 {len(label)} 0.cls\n"
    (tmp_path / "train" / "0.idx").write_text(index)
    records = find_records(tmp_path, "train", "webdataset")
    loader = DaliRecordLoader(records, 3, 0, CropStream(1, 1, seed=5, sizes=((0, 8),)), CPU, 1, "cpu", refuse)
    with pytest.raises(OSError, match=r"train holds a label that is no number: b'.*each \.cls is a class in"):
        list(loader.epoch(0))


def first_shard(root):
    return min((root / "train").glob("*.tar"))


def spoil(tar, images):
    """Zeros for the beginning of these images of a shard; their names as DALI tells them."""
    content, names = bytearray(tar.read_bytes()), []
    with tarfile.open(tar) as members:
        for image in [member for member in members.getmembers() if member.name.endswith(".jpg")][images]:
            content[image.offset_data : image.offset_data + 200] = bytes(200)
            names.append(image.name)
    tar.write_bytes(content)
    return names


@pytest.mark.slow
def test_another_image_of_the_batch_stands_in_for_a_bad_one(packed, tmp_path):
    good = [batch for epoch in range(2) for batch in train(packed, "webdataset").epoch(epoch)]
    shutil.copytree(packed / "webdataset", tmp_path / "webdataset")
    bad = spoil(first_shard(tmp_path / "webdataset"), slice(1, 6, 2))
    told = []
    loader = train(tmp_path, "webdataset", on_bad=lambda name, reason: told.append(name.rpartition(":")[2]))
    found = [batch for epoch in range(2) for batch in loader.epoch(epoch)]
    assert sorted(told) == sorted(bad)  # each once, though met in two epochs
    places = [
        (i, k)
        for i, (one, other) in enumerate(zip(good, found, strict=True))
        for k in range(8)
        if not torch.equal(one.images[k], other.images[k])
    ]
    assert len({place for place in places if good[place[0]].labels[place[1]] != PADDING_LABEL}) == 6
    for i, k in places:
        other = next(n % 8 for n in range(k + 1, k + 8) if (i, n % 8) not in places)
        expected = good[i].labels[other] if good[i].labels[k] != PADDING_LABEL else PADDING_LABEL
        assert found[i].labels[k] == expected
    for stop in (3, 8):  # resumed without and with the reader's state, whatever was met before
        resumed = train(tmp_path, "webdataset", on_bad=lambda *_: None)
        for k, batch in enumerate(resumed.epoch(*divmod(stop, 6))):
            assert equal(batch, found[stop + k])


def test_a_bad_image_does_not_count_in_evaluation(packed, tmp_path):
    shutil.copytree(packed / "webdataset" / "val", tmp_path / "train")
    bad = spoil(first_shard(tmp_path), slice(2, 3))
    records = find_records(tmp_path, "train", "webdataset")
    told = []
    evaluated = DaliRecordLoader(
        records, 3, 0, EvalStream(15, 4), CPU, 2, "cpu", lambda *bad: told.append(bad), (64, 56)
    )
    labels = torch.cat([batch.labels for batch in evaluated.epoch(0)])
    assert len(told) == 1
    assert told[0][0].endswith(bad[0])
    assert (labels != PADDING_LABEL).sum() == 14


@pytest.mark.slow
def test_nothing_that_can_be_decoded_ends_the_run(packed, tmp_path):
    shutil.copytree(packed / "webdataset", tmp_path / "webdataset")
    for tar in (tmp_path / "webdataset" / "train").glob("*.tar"):
        spoil(tar, slice(None))
    with pytest.raises(OSError, match=r"no image of a whole batch can be decoded, in .*train"):
        list(train(tmp_path, "webdataset", on_bad=lambda *_: None).epoch(0))
