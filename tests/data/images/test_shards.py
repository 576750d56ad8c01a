import hashlib
import io
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from data.images.files import load_image_files
from data.images.shards import READER_EXTENSIONS, open_shards, write_shards

REPOSITORY = Path(__file__).parents[3]
SHARD_BYTES = 25_000

# A program that its worker processes import too: every file takes a while to reach the disk.
SLOW = """
import os, sys, time
from pathlib import Path

fsync = os.fsync

def slow_fsync(descriptor):
    time.sleep(0.02)
    fsync(descriptor)

os.fsync = slow_fsync

if __name__ == "__main__":
    from data.images.files import load_image_files
    from data.images.shards import write_shards

    files = load_image_files(Path(sys.argv[1]), "train")
    write_shards(
        files, Path(sys.argv[2]), shard_bytes=1, seed=7, workers=2, on_progress=lambda done, total: None
    )
"""


def add_image(path: Path, random: np.random.Generator, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = random.integers(20, 60, 2)
    Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8)).save(path, **options)


def make_tree(root: Path, num_images: int) -> Path:
    random = np.random.default_rng(0)
    for number in range(num_images):
        suffix = ("JPEG", "jpg", "jpeg")[number % 3]
        add_image(root / "train" / "abc"[number % 7 % 3] / f"image {number}.{suffix}", random, format="JPEG")
    return root


def write(root: Path, destination: Path, files=None, **options):
    defaults = {"shard_bytes": SHARD_BYTES, "seed": 7, "workers": 1, "on_progress": lambda done, total: None}
    return write_shards(files or load_image_files(root, "train"), destination, **defaults | options)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def identities(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()}


def flip_a_bit(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return make_tree(tmp_path_factory.mktemp("images"), 61)


@pytest.fixture(scope="module")
def written(tree, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write(tree, folder)
    return folder


@pytest.fixture
def copy(written, tmp_path):
    return Path(shutil.copytree(written, tmp_path / "copy"))


def test_the_bytes_do_not_depend_on_the_number_of_workers_and_progress_is_told(tree, written, tmp_path):
    told = []
    shards = write(tree, tmp_path, workers=2, on_progress=lambda *progress: told.append(progress))
    assert contents(tmp_path) == contents(written)
    assert shards.digest == open_shards(written).digest
    assert len(told) == len(shards.tars)
    assert [total for _, total in told] == [61] * len(told)
    assert told[-1][0] == 61
    assert sorted(done for done, _ in told) == [done for done, _ in told]


def samples_in_shards(folder):
    shards = json.loads((folder / "manifest.json").read_text())["content"]["shards"]
    return [shard["images"] for shard in shards]


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


def start_slowly(tree, folder):
    """A program of its own, in a process group of its own, that writes 61 shards into folder/"shards"."""
    program = folder / "slow.py"
    program.write_text(SLOW)
    process = subprocess.Popen(
        [sys.executable, program, tree, folder / "shards"],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        start_new_session=True,
        stderr=subprocess.DEVNULL,
    )
    return process, folder / "shards"


def wait_until_writing(process, folder):
    """Until some shards are finished and one is being written."""
    end = time.monotonic() + 60
    while len(list(folder.glob("*.tsv"))) < 3 or not list(folder.glob(".shard-*.tar.*.partial")):
        assert process.poll() is None, "it has ended already"
        assert time.monotonic() < end, "it does not begin to write"
        time.sleep(0.001)


@pytest.mark.slow
def test_a_killed_run_is_finished_by_the_next(tree, tmp_path):
    process, folder = start_slowly(tree, tmp_path)
    wait_until_writing(process, folder)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    finished = {path.stem for path in folder.glob("*.tsv")}
    assert 3 <= len(finished) < 61
    with pytest.raises(
        FileNotFoundError, match=r"manifest.json is missing: `acdc prepare shards SRC .*/shards`"
    ):
        open_shards(folder)
    before = {name: at for name, at in identities(folder).items() if Path(name).stem in finished}
    (folder / ".shard-00000.tar.1.partial").touch()  # as a run leaves that was killed in the middle of a tar
    write(tree, folder, shard_bytes=1)
    write(tree, tmp_path / "uninterrupted", shard_bytes=1)
    assert contents(folder) == contents(tmp_path / "uninterrupted")
    assert before.items() <= identities(folder).items()
    samples_per_shard = samples_in_shards(folder)
    assert samples_per_shard.count(0) == 0
    assert sum(samples_per_shard) == 61


@pytest.mark.slow
def test_workers_end_when_the_parent_is_killed(tree, tmp_path):
    process, folder = start_slowly(tree, tmp_path)
    wait_until_writing(process, folder)
    children = psutil.Process(process.pid).children()
    assert len(children) >= 2
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=20)
    for child in alive:
        child.kill()
    assert not alive


def test_a_finished_folder_is_left_as_it_is(tree, copy):
    before = identities(copy)
    assert write(tree, copy) == open_shards(copy)
    assert identities(copy) == before


def test_damaged_shards_are_written_anew_and_only_these(tree, written, copy):
    with (copy / "shard-00000.tar").open("r+b") as file:
        file.truncate(10_000)
    flip_a_bit(copy / "shard-00001.tar", 3_000)
    (copy / "shard-00002.tar").unlink()
    (copy / "shard-00003.idx").unlink()
    flip_a_bit(copy / "shard-00004.idx", 20)
    flip_a_bit(copy / "shard-00005.tsv", 200)
    flip_a_bit(copy / "manifest.json", 300)
    before = identities(copy)
    assert len(list(copy.glob("*.tar"))) > 6
    write(tree, copy)
    assert contents(copy) == contents(written)
    after = identities(copy)
    for number in range(len(list(copy.glob("*.tar")))):
        name = f"shard-{number:05d}.tar"
        assert (before.get(name) == after[name]) == (number > 5)


def test_while_a_shard_is_written_anew_the_folder_is_not_finished(tree, written, copy):
    def interrupt(done, total):
        raise KeyboardInterrupt

    (copy / "shard-00000.tar").unlink()
    with pytest.raises(KeyboardInterrupt):
        write(tree, copy, on_progress=interrupt)
    with pytest.raises(FileNotFoundError, match=r"manifest.json is missing"):
        open_shards(copy)
    write(tree, copy)
    assert contents(copy) == contents(written)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 8}, "copy is in use: seed is 7, not 8. Nothing was changed; give an empty folder"),
        ({"shard_bytes": 9_000, "seed": 1}, "seed is 7, not 1, shard_bytes is 25000, not 9000"),
    ],
)
def test_another_order_or_size_is_refused(tree, written, copy, changes, message):
    with pytest.raises(ValueError, match=message):
        write(tree, copy, **changes)
    assert contents(copy) == contents(written)


def test_another_source_is_refused(tree, written, copy, tmp_path):
    other = Path(shutil.copytree(tree, tmp_path / "other"))
    image = next((other / "train" / "a").iterdir())

    def refused(message):
        with pytest.raises(ValueError, match=message):
            write(other, copy)
        assert contents(copy) == contents(written)

    with image.open("ab") as file:
        file.write(b"more")
    refused("other sizes of files")
    image.rename(other / "train" / "b" / image.name)
    refused("in use: other names and labels")
    (other / "train" / "b" / image.name).unlink()
    refused("images is 61, not 60, other names and labels")
    (other / "train" / "c").rename(other / "train" / "d")
    refused("other classes")


def test_a_folder_with_other_things_or_a_damaged_plan_is_refused(tree, copy, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"other is in use: thesis.tex and no plan.json"):
        write(tree, other)
    assert [path.name for path in other.iterdir()] == ["thesis.tex"]
    (copy / "plan.json").write_text("{")
    with pytest.raises(ValueError, match=r"a damaged plan.json"):
        write(tree, copy)


def test_sizes_and_workers_must_be_positive(tree, tmp_path):
    with pytest.raises(ValueError, match="shard_bytes=0 and workers=1 must both be at least 1"):
        write(tree, tmp_path, shard_bytes=0)
    with pytest.raises(ValueError, match="workers=0"):
        write(tree, tmp_path, workers=0)


@pytest.mark.parametrize("empty", [True, False])
def test_empty_and_unreadable_files_are_found_before_anything_is_written(tmp_path, empty):
    train = make_tree(tmp_path / "images", 9) / "train"
    bad = train / "a" / "bad.jpg"
    if empty:
        bad.touch()
    else:
        bad.symlink_to("nowhere")
    what = "is empty" if empty else "cannot be read: No such file or directory"
    with pytest.raises(ValueError, match=rf"a/bad.jpg {what}.*`acdc verify-data` finds all such files"):
        write(tmp_path / "images", tmp_path / "shards")
    assert not list((tmp_path / "shards").iterdir())


def test_a_file_that_fails_while_it_is_read_leaves_the_finished_shards(tree, written, tmp_path):
    *earlier, last = sorted(written.glob("*.tsv"))
    name = last.read_text().splitlines()[-1].split("\t")[-1]
    other = Path(shutil.copytree(tree, tmp_path / "other"))
    files = load_image_files(other, "train")
    (other / name).unlink()
    (other / name / "a folder where an image should be").mkdir(parents=True)
    with pytest.raises(ValueError, match=rf"{name} cannot be read: Is a directory. Finished shards are kept"):
        write(other, tmp_path / "shards", files=files)
    assert [path.name for path in sorted((tmp_path / "shards").glob("*.tsv"))] == [
        path.name for path in earlier
    ]
    assert not list((tmp_path / "shards").glob(".*"))


def test_a_file_that_is_not_as_long_as_it_says_is_refused(tmp_path):
    image = Path("/sys/devices/system/cpu/online")
    if not image.exists() or image.stat().st_size != 4096:
        pytest.skip("needs a file whose content is shorter than its size")
    train = make_tree(tmp_path / "images", 2) / "train"
    (train / "a" / "bad.jpg").symlink_to(image)
    with pytest.raises(ValueError, match=r"a/bad.jpg has changed: 4096 bytes at the start, \d+ now"):
        write(tmp_path / "images", tmp_path / "shards")


def test_a_killed_worker_is_reported(tree, tmp_path):
    def kill(done, total):
        for child in multiprocessing.active_children():
            child.kill()

    with pytest.raises(ChildProcessError, match="was killed: start again, with fewer workers"):
        write(tree, tmp_path, shard_bytes=1, on_progress=kill)
    assert list(tmp_path.glob("*.tsv"))


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
