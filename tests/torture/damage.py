"""Files of a run that are damaged: flipped bits, cut short, emptied, removed."""

from __future__ import annotations

import contextlib
import logging
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.trainer.runs import assert_equal_states
from trainer.checkpoints import checkpoint
from trainer.checkpoints.checkpoint import CheckpointError
from trainer.checkpoints.run_dir import RunDir, find_resumed
from trainer.checkpoints.saved_model import load_model
from trainer.config.load import load_config
from trainer.errors import UserError
from trainer.monitor.event_files import keep_until
from trainer.report.run import write_report

KINDS = ("flip", "truncate", "empty", "delete")


def damaged(run: Path, scratch: Path, count: int, seed: int) -> Iterator[bool]:
    """For each of `count` damages to files of a finished run, every file and kind in turn: whether all that
    is read of the run is refused in words or is as it was, and the newest whole state is gone on from."""
    generator, copy = random.Random(seed), scratch / run.parent.name / run.name
    shutil.copytree(run, copy)
    files = sorted(path for path in copy.rglob("*") if path.is_file() and path.stat().st_size)
    content = {path: path.read_bytes() for path in files}
    sound = {folder: _content(folder) for folder in _checkpoints(copy)}
    pairs = [(path, kind) for path in files for kind in KINDS]
    generator.shuffle(pairs)
    logging.disable(logging.WARNING)
    try:
        for number in range(count):
            path, kind = pairs[number % len(pairs)]
            _damage(path, content[path], kind, generator)
            fault = _fault(copy, path, sound)
            if fault is not None:
                print(f"\n{kind} {path.relative_to(copy)}: {fault}", file=sys.stderr)
            yield fault is None
            _restore(copy, content)
    finally:
        logging.disable(logging.NOTSET)


def _damage(path: Path, content: bytes, kind: str, generator: random.Random) -> None:
    if kind == "delete":
        path.unlink()
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "truncate":
        path.write_bytes(content[: generator.randrange(1, len(content))])
    else:
        changed = bytearray(content)
        changed[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        path.write_bytes(changed)


def _restore(run: Path, content: dict[Path, bytes]) -> None:
    for path in [path for path in run.rglob("*") if path.is_file() and path not in content]:
        path.unlink()
    for path, whole in content.items():
        if not path.is_file() or path.read_bytes() != whole:
            path.write_bytes(whole)


def _checkpoints(run: Path) -> list[Path]:
    return sorted(path for path in (run / "checkpoints").iterdir() if path.is_dir())


def _content(folder: Path) -> dict[str, Any]:
    """All that a checkpoint is used for. Raises CheckpointError for a damaged one."""
    model, info = load_model(folder)
    state = checkpoint.read(folder, checkpoint.STATE) if (folder / checkpoint.STATE).exists() else None
    return {"weights": dict(model.state_dict()), "info": info, "state": state}


def _fault(run: Path, path: Path, sound: dict[Path, Any]) -> str | None:
    """What is wrong with how a damaged run is received, or None."""
    try:
        if path.parent in sound:
            with contextlib.suppress(CheckpointError):
                assert_equal_states(_content(path.parent), sound[path.parent])
        folder = RunDir(run)
        result = folder.read_result()
        folder.read_metrics()
        with contextlib.suppress(ValueError):  # no epoch is left to draw
            write_report(folder, result)
        keep_until(folder.tensorboard, 10**9)
        with contextlib.suppress(UserError):
            load_config(str(run / "config.yaml"))
        resumed = find_resumed(load_config("quickstart", [f"resume={run}"]))
        assert resumed is not None, "nothing is left to go on from"
        assert_equal_states(_content(resumed[1]), sound[resumed[1]])
    except AssertionError as error:
        return f"changed: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None
