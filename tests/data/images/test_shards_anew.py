"""Packing that is killed, repeated or refused: what is finished stays, and nothing else passes for it."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from data.images.files import load_image_files
from data.images.shards import open_shards
from tests.data.images.packing import contents, flip_a_bit, identities, make_tree, samples_in_shards, write

REPOSITORY = Path(__file__).parents[3]

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
