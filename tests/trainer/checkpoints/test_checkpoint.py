import json
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch

from tests.hostile import Evil
from trainer.checkpoints import checkpoint
from trainer.checkpoints.checkpoint import CheckpointError

CONTENT = {"weights": torch.arange(5000.0), "names": ["a", "b"], "none": None}


@pytest.fixture
def saved(tmp_path):
    folder = tmp_path / "step-000000001"
    checkpoint.save(folder, {checkpoint.STATE: CONTENT}, {"epoch": 3})
    return folder


def test_what_is_saved_is_read(saved):
    assert checkpoint.read_info(saved) == {"epoch": 3}
    read = checkpoint.read(saved, checkpoint.STATE)
    assert torch.equal(read["weights"], CONTENT["weights"])
    assert (read["names"], read["none"]) == (["a", "b"], None)
    assert sorted(path.name for path in saved.parent.iterdir()) == [saved.name]


def test_every_flipped_bit_is_found(saved):
    generator = random.Random(0)
    path = saved / checkpoint.STATE
    whole = path.read_bytes()
    for _ in range(100):
        content = bytearray(whole)
        content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"state\.pt is damaged"):
            checkpoint.read(saved, checkpoint.STATE)


def test_a_flipped_bit_in_the_manifest_is_found_or_changes_nothing(saved):
    path = saved / checkpoint.MANIFEST
    whole, info = path.read_bytes(), checkpoint.read_info(saved)
    found = 0
    for place in range(8 * len(whole)):
        content = bytearray(whole)
        content[place // 8] ^= 1 << place % 8
        path.write_bytes(content)
        try:
            assert checkpoint.read_info(saved) == info
        except CheckpointError:
            found += 1
    assert found > 0.9 * 8 * len(whole)  # the rest is white space


def test_a_manifest_of_format_1_has_no_digest(saved):
    path = saved / checkpoint.MANIFEST
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "format": 1}))
    with pytest.raises(CheckpointError, match="is damaged: its own SHA-256"):
        checkpoint.read_info(saved)
    del manifest[checkpoint.OWN_DIGEST]
    path.write_text(json.dumps({**manifest, "format": 1}))
    assert checkpoint.read_info(saved) == {"epoch": 3}


def test_what_is_no_checkpoint_is_told(tmp_path, saved):
    with pytest.raises(CheckpointError, match=r"is not a checkpoint: no readable manifest\.json"):
        checkpoint.read_info(tmp_path / "nowhere")
    (saved / checkpoint.STATE).unlink()
    with pytest.raises(CheckpointError, match="is a damaged or incomplete checkpoint"):
        checkpoint.read_info(saved)
    for text in ("[]", "{", '{"format": 1}', '{"format": 1, "sha256": [], "info": {}}'):
        (saved / checkpoint.MANIFEST).write_text(text)
        with pytest.raises(CheckpointError, match="is not a checkpoint"):
            checkpoint.read_info(saved)
    (saved / checkpoint.MANIFEST).write_text('{"format": 99, "sha256": {}, "info": {}}')
    with pytest.raises(CheckpointError, match="format 99; this version reads formats 1 and 2"):
        checkpoint.read_info(saved)


@pytest.mark.parametrize("save", [torch.save, lambda what, path: path.write_bytes(pickle.dumps(what, 2))])
def test_nothing_in_a_file_is_executed(saved, tmp_path, save):
    target = tmp_path / "executed"
    save({"weights": Evil(os.system, f"touch {target}")}, saved / checkpoint.STATE)
    manifest = json.loads((saved / checkpoint.MANIFEST).read_text())
    manifest["sha256"][checkpoint.STATE] = checkpoint.sha256(saved / checkpoint.STATE)
    manifest[checkpoint.OWN_DIGEST] = checkpoint.digest_of(manifest)
    (saved / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.read(saved, checkpoint.STATE)
    assert not target.exists()


def test_the_newest_whole_one_is_chosen_and_old_ones_go(tmp_path):
    for step in (5, 10, 900):
        checkpoint.save(checkpoint.step_folder(tmp_path, step), {checkpoint.STATE: step}, {"step": step})
    checkpoint.remove_old(tmp_path, keep=2)
    assert [path.name for path in checkpoint.training_checkpoints(tmp_path)] == [
        "step-000000010",
        "step-000000900",
    ]
    assert checkpoint.newest_whole(tmp_path) == checkpoint.step_folder(tmp_path, 900)
    (checkpoint.step_folder(tmp_path, 900) / checkpoint.STATE).write_bytes(b"")
    assert checkpoint.newest_whole(tmp_path) == checkpoint.step_folder(tmp_path, 10)


def test_a_refused_write_leaves_the_previous_one(saved, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(saved, {checkpoint.STATE: {}}, {"epoch": 4})
    assert checkpoint.read_info(saved) == {"epoch": 3}
    assert sorted(path.name for path in saved.parent.iterdir()) == [saved.name]


WRITER = """
import sys, torch
from pathlib import Path
from trainer.checkpoints import checkpoint
step = 0
while True:
    step += 1
    folder = Path(sys.argv[1]) / "twice" if step % 2 else checkpoint.step_folder(Path(sys.argv[1]), step)
    checkpoint.save(folder, {checkpoint.STATE: torch.full((200_000,), float(step))}, {"step": step})
    checkpoint.remove_old(Path(sys.argv[1]), keep=2)
    print(step, flush=True)
"""


@pytest.mark.slow
def test_killed_while_writing_there_is_always_a_whole_one(tmp_path):
    generator = random.Random(1)
    for _ in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        while int(process.stdout.readline()) < 4:
            pass
        time.sleep(generator.random() * 0.1)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        states = checkpoint.training_checkpoints(tmp_path)
        assert states
        for path in states:
            assert checkpoint.read(path, checkpoint.STATE)[0] == checkpoint.read_info(path)["step"]


def test_a_disk_that_refuses_is_an_os_error_and_leaves_what_was_there(saved):
    """torch's writer says "unexpected pos" over it. A limit of file sizes stands in for a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        with pytest.raises(OSError, match=r"state\.pt cannot be written: .*File too large"):
            checkpoint.save(saved, {checkpoint.STATE: torch.zeros(10**6)}, {"epoch": 4})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert checkpoint.read_info(saved) == {"epoch": 3}
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]
