"""What shards hold, how DALI reads them, and what is said where they are damaged."""

import hashlib
import io
import itertools
import json
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

from data.images.files import load_image_files
from data.images.shards import READER_EXTENSIONS, open_shards
from tests.data.images.packing import SHARD_BYTES, add_image, contents, samples_in_shards, write


def test_the_bytes_do_not_depend_on_the_number_of_workers_and_progress_is_told(tree, written, tmp_path):
    told = []
    shards = write(tree, tmp_path, workers=2, on_progress=lambda *progress: told.append(progress))
    assert contents(tmp_path) == contents(written)
    assert shards.digest == open_shards(written).digest
    assert len(told) == len(shards.tars)
    assert [total for _, total in told] == [61] * len(told)
    assert told[-1][0] == 61
    assert sorted(done for done, _ in told) == [done for done, _ in told]


def test_what_the_tars_hold(tree, written):
    shards, files = open_shards(written), load_image_files(tree, "train")
    labels = dict(zip(files.files, files.labels.tolist(), strict=True))
    assert shards.classes == ("a", "b", "c")
    samples_per_shard = samples_in_shards(written)
    assert shards.num_samples == sum(samples_per_shard) == 61
    assert len(shards.tars) >= 4
    seen, keys = [], []
    for tar, num_samples in zip(shards.tars, samples_per_shard, strict=True):
        assert tar.stat().st_size <= SHARD_BYTES + 10_240
        assert tar.stat().st_size % tarfile.RECORDSIZE == 0
        head, *lines = tar.with_suffix(".tsv").read_text().splitlines()
        digest = hashlib.sha256(tar.read_bytes()).hexdigest()
        assert head == f"{tar.name}\t{tar.stat().st_size}\t{digest}"
        with tarfile.open(tar) as archive:
            members = archive.getmembers()
            assert len(members) == 2 * num_samples == 2 * len(lines)
            for image, label, line in zip(members[::2], members[1::2], lines, strict=True):
                key, number, size, digest, source = line.split("\t")
                data = archive.extractfile(image).read()
                assert data == (tree / source).read_bytes()
                assert (len(data), hashlib.sha256(data).hexdigest()) == (int(size), digest)
                assert (image.name, label.name) == (f"{key}.jpg", f"{key}.cls")
                assert archive.extractfile(label).read() == number.encode() == str(labels[source]).encode()
                seen.append(source)
                keys.append(key)
            assert {(m.mtime, m.uid, m.gid, m.mode, m.uname) for m in members} == {(0, 0, 0, 0o644, "")}
    assert sorted(seen) == list(files.files)
    assert keys == [f"{number:09d}" for number in range(61)]
    runs = [len(list(run)) for _, run in itertools.groupby(labels[source] for source in seen)]
    assert max(runs) < 10  # classes are mixed: the tree holds them in runs of 17 and more


def test_nested_folders_are_packed(tmp_path):
    random = np.random.default_rng(2)
    names = ["a/x.JPEG", "a/deep/x.JPEG", "a/deep/er/y.png", "b/only nested/x.JPEG", "b/only nested/bad.JPEG"]
    for name in names:
        add_image(tmp_path / "images" / "train" / name, random)
    (tmp_path / "images" / "excluded.txt").write_text(f"train/{names.pop()}\tempty\n")
    shards = write(tmp_path / "images", tmp_path / "shards", shard_bytes=10**6)
    _, *lines = shards.tars[0].with_suffix(".tsv").read_text().splitlines()
    sources = {line.split("\t")[4]: line.split("\t")[1] for line in lines}
    assert sources == {f"train/{name}": "01"[name.startswith("b")] for name in names}


def test_the_seed_decides_the_order(tree, written, tmp_path):
    write(tree, tmp_path, seed=8)
    assert contents(tmp_path)["shard-00000.tar"] != contents(written)["shard-00000.tar"]


def test_the_manifest_lists_every_file(written):
    manifest = json.loads((written / "manifest.json").read_text())
    listed = {
        entry["file"]: (entry["bytes"], entry["sha256"])
        for shard in manifest["content"]["shards"]
        for entry in (shard["tar"], shard["idx"], shard["tsv"])
    }
    there = {name: data for name, data in contents(written).items() if name.startswith("shard-")}
    assert listed == {name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in there.items()}


@pytest.mark.skipif(shutil.which("tar") is None, reason="DALI's own tool needs tar")
def test_the_index_is_the_one_of_dalis_own_tool(written, tmp_path):
    wds2idx = pytest.importorskip("wds2idx", reason="DALI is not installed")
    shards = open_shards(written)
    for tar, index in zip(shards.tars, shards.indices, strict=True):
        with wds2idx.IndexCreator(str(tar), str(tmp_path / "index"), verbose=False) as creator:
            creator.create_index()
        assert index.read_bytes() == (tmp_path / "index").read_bytes()


def read_with_dali(shards, extensions, counts, shard_id=0, num_shards=1):
    """For each of `counts`, that many (image bytes, label), one after another."""
    dali = pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    pipeline = dali.Pipeline(batch_size=1, num_threads=1, device_id=None)
    with pipeline:
        pipeline.set_outputs(
            *dali.fn.readers.webdataset(
                paths=[str(path) for path in shards.tars],
                index_paths=[str(path) for path in shards.indices],
                ext=list(extensions),
                missing_component_behavior="error",
                shard_id=shard_id,
                num_shards=num_shards,
            )
        )
    pipeline.build()
    for count in counts:
        outputs = (pipeline.run() for _ in range(count))
        yield [(bytes(image.at(0)), int(bytes(label.at(0)))) for image, label in outputs]


@pytest.mark.parametrize("num_shards", [1, 3])
def test_dali_reads_every_sample_once_an_epoch(tree, written, num_shards):
    shards, files = open_shards(written), load_image_files(tree, "train")
    bounds = [61 * part // num_shards for part in range(num_shards + 1)]
    sizes = np.diff(bounds).tolist()
    readers = []
    for shard_id in range(num_shards):
        counts = [sizes[(shard_id + epoch) % num_shards] for epoch in range(2)]  # a reader moves on by a part
        readers.append(list(read_with_dali(shards, ["jpg", "cls"], counts, shard_id, num_shards)))
    expected = sorted(
        ((tree / file).read_bytes(), label)
        for file, label in zip(files.files, files.labels.tolist(), strict=True)
    )
    for epoch in zip(*readers, strict=True):
        assert sorted(itertools.chain.from_iterable(epoch)) == expected


def test_dali_reads_all_kinds_of_images(tmp_path):
    random = np.random.default_rng(1)
    for name in ("1.png", "2.JPEG", "3.PNG", "4.webp"):
        add_image(tmp_path / "images" / "train" / "a" / name, random)
    shards = write(tmp_path / "images", tmp_path / "shards", shard_bytes=5_000)
    (samples,) = read_with_dali(shards, READER_EXTENSIONS, [4])
    images = [path.read_bytes() for path in (tmp_path / "images" / "train" / "a").iterdir()]
    assert sorted(image for image, _ in samples) == sorted(images)
    kinds = {Image.open(io.BytesIO(image)).format for image, _ in samples}
    assert kinds == {"PNG", "JPEG", "WEBP"}


@pytest.mark.parametrize("name", ["shard-00001.tar", "shard-00002.idx"])
def test_missing_and_cut_files_are_named(copy, name):
    again = "`acdc prepare shards SRC .*/copy` writes it anew"
    path = copy / name
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size - 1)
    with pytest.raises(ValueError, match=rf"{name} has {size - 1} bytes, not {size}: {again}"):
        open_shards(copy)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{name} is missing: copy it again, or {again}"):
        open_shards(copy)


def test_a_folder_without_shards_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere/manifest.json is missing: `acdc prepare shards"):
        open_shards(tmp_path / "nowhere")


@pytest.mark.parametrize("damage", ["half", "flipped", "not JSON", "a list"])
def test_a_damaged_manifest_is_told(copy, damage):
    manifest = copy / "manifest.json"
    data = manifest.read_bytes()
    damaged = {
        "half": data[: len(data) // 2],
        "flipped": data.replace(b'"images": 61', b'"images": 60', 1),
        "not JSON": b"\0" * len(data),
        "a list": b"[1, 2]",
    }[damage]
    assert damaged != data
    manifest.write_bytes(damaged)
    with pytest.raises(
        ValueError, match=r"manifest.json is damaged: `acdc prepare shards SRC .*` checks the shards"
    ):
        open_shards(copy)
