"""Files of a run that are damaged at random, and files that would execute something if they were believed."""

from __future__ import annotations

import json
import logging
import os
import pickle
import random
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from tests.trainer.runs import assert_equal_states
from trainer.checkpoints import checkpoint
from trainer.checkpoints.run_dir import RunDir, find_resumed
from trainer.checkpoints.saved_model import load_model
from trainer.checkpoints.weights import load_weights
from trainer.config.load import load_config
from trainer.errors import UserError
from trainer.monitor.event_files import keep_until
from trainer.originals.checkpoints import load_original
from trainer.report.run import write_report

KINDS = ("flip", "truncate", "empty", "delete")


def damaged(run: Path, scratch: Path, count: int, generator: random.Random) -> Iterator[bool]:
    """For each of `count` damages to files of a finished run: whether it was refused in a sentence, or
    changed nothing that the run goes on from."""
    logging.disable(logging.WARNING)
    copy = scratch / run.parent.name / run.name
    shutil.copytree(run, copy)
    files = sorted(path for path in copy.rglob("*") if path.is_file() and path.stat().st_size)
    sound = {folder: _content(folder) for folder in _checkpoints(copy)}
    for _ in range(count):
        path = generator.choice(files)
        before = path.read_bytes()
        _damage(path, before, generator)
        try:
            yield _is_harmless(copy, path, sound)
        except (UserError, ValueError, OSError):  # CheckpointError among them: messages, for people
            yield True
        except Exception as error:
            logging.getLogger(__name__).error("%s: %r", path.relative_to(copy), error)
            yield False
        for other in (*copy.glob("*.damaged"), *copy.glob("tb/*")):
            other.unlink(missing_ok=True)
        shutil.copytree(run, copy, dirs_exist_ok=True)
        path.write_bytes(before)
    logging.disable(logging.NOTSET)


def _damage(path: Path, content: bytes, generator: random.Random) -> None:
    kind = generator.choice(KINDS)
    if kind == "delete":
        path.unlink()
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "truncate":
        path.write_bytes(content[: generator.randrange(len(content))])
    else:
        changed = bytearray(content)
        changed[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        path.write_bytes(changed)


def _checkpoints(run: Path) -> list[Path]:
    return sorted(path for path in (run / "checkpoints").iterdir() if path.is_dir())


def _content(folder: Path) -> Any:
    """What is gone on from, or used: raises CheckpointError for a damaged one."""
    if (folder / checkpoint.STATE).exists() and folder.name.startswith("step-"):
        return checkpoint.read(folder, checkpoint.STATE)
    model, info = load_model(folder)
    return {"weights": model.state_dict(), "info": info}


def _is_harmless(run: Path, path: Path, sound: dict[Path, Any]) -> bool:
    """Whether everything that reads the run still finds what was there."""
    for folder, content in sound.items():
        if folder == path.parent:
            assert_equal_states(_content(folder), content)  # or raises
    folder = RunDir(run)
    folder.read_metrics()
    folder.read_result()
    write_report(folder)
    keep_until(folder.tensorboard, 10**9)
    load_config(str(run / "config.yaml"))
    resumed = find_resumed(load_config("quickstart", [f"resume={run}"]))
    assert resumed is not None
    assert_equal_states(checkpoint.read(resumed[1], checkpoint.STATE), sound[resumed[1]])
    return True


class _Evil:
    """A pickle of it calls `function` with these arguments where it is believed."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def hostile(scratch: Path) -> Iterator[bool]:
    """For each file that would make another one if it were believed, and each way to read it: whether that
    other file is still missing."""
    trap = scratch / "executed"
    evils = [
        _Evil(os.system, f"touch {trap}"),
        _Evil(eval, f"open({str(trap)!r}, 'w')"),
        _Evil(exec, f"open({str(trap)!r}, 'w')"),
        _Evil(open, str(trap), "w"),
        _Evil(os.mkdir, str(trap)),
        _Evil(Path.touch, trap),
    ]
    folder = scratch / "hostile"
    folder.mkdir()
    for number, evil in enumerate(evils):
        for nested in (evil, {"state_dict": {"weight": evil}}, [evil] * 3):
            raw = pickle.dumps(nested, protocol=2)
            plain, zipped = folder / f"{number}.pt", folder / f"{number}.zip.pt"
            plain.write_bytes(raw)
            with zipfile.ZipFile(zipped, "w") as archive:
                archive.writestr("archive/data.pkl", raw)
                archive.writestr("archive/version", "3")
            for file in (plain, zipped):
                for read in (_as_state, load_original, _as_weights):
                    try:
                        read(file)
                    except Exception:
                        pass  # refused, in one way or another; what matters is the trap
                    yield not trap.exists()


def _as_state(file: Path) -> None:
    """A checkpoint that holds it, with digests that fit."""
    folder = file.parent / f"step-{file.stem}"
    checkpoint.save(folder, {checkpoint.STATE: {}}, {})
    shutil.copyfile(file, folder / checkpoint.STATE)
    manifest = {"format": checkpoint.FORMAT, "info": {}}
    manifest["sha256"] = {checkpoint.STATE: checkpoint.sha256(folder / checkpoint.STATE)}
    manifest[checkpoint.OWN_DIGEST] = checkpoint.digest_of(manifest)
    (folder / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    checkpoint.read(folder, checkpoint.STATE)


def _as_weights(file: Path) -> None:
    load_weights(nn.Linear(2, 2), file, None, {})
