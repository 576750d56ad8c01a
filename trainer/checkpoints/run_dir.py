"""The folder of a run and the small files in it.

runs/<name>/<time>/  config.yaml     the resolved configuration
                     deepspeed.json  what DeepSpeed was given
                     env.json        versions, hardware, revision, command
                     history.jsonl   a line per start: from which step on, the recipe and what it changed
                     metrics.jsonl   a line per epoch and per logged step
                     tb/             the same for TensorBoard
                     checkpoints/    training states, dense_twin, sparse
                     masks/          of every compression, where save.mask_history asks for them
                     finetuned_dense/  a run folder of its own: the dense twin, trained on (finetune_dense)
                     result.json     the closing table's figures
                     report.html     a page of all that is worth looking at
                     kernels.json    sparse against dense, a layer each, where kernels were measured
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from data.atomic import write_text
from trainer.checkpoints.checkpoint import STATE, CheckpointError, newest_whole, read
from trainer.checkpoints.environment import environment
from trainer.config.recipes import dump_recipe, read_yaml
from trainer.config.schema import Config
from trainer.errors import UserError, as_user_error
from trainer.paths import user_path

log = logging.getLogger(__name__)

DENSE_TWIN, SPARSE = "dense_twin", "sparse"
FINETUNED_DENSE = "finetuned_dense"
EMA = "_ema"  # after one of these names: the model of averaged weights
# Numbers that records must have to be used, by kind
_NUMBERS = {
    "step": ("epoch", "step", "lr", "loss"),
    "epoch": ("epoch", "step", "lr", "train_loss", "val_loss", "val_top1", "sparsity"),
}
_ROW = ("epoch", "top1", "top5", "loss", "sparsity")


class RunDir:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.tensorboard = path / "tb"
        self.metrics = path / "metrics.jsonl"
        self.history = path / "history.jsonl"
        self.result = path / "result.json"
        self.report = path / "report.html"
        self.kernels = path / "kernels.json"
        self.masks = path / "masks"
        self.finetuned_dense = path / FINETUNED_DENSE
        self._lock: IO[str] | None = None

    @property
    def resumed_by(self) -> Path:
        """What `resume` has to name for this run to go on: a dense branch goes on with its run."""
        return self.path.parent if self.path.name == FINETUNED_DENSE else self.path

    def read_result(self) -> dict[str, Any] | None:
        """None where there is none. One that cannot be read is set aside, and the run is not finished: its
        training state alone decides."""
        try:
            result = json.loads(self.result.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError):
            result = None
        if _is_result(result):
            return dict(result)
        log.warning("%s cannot be read; it is set aside", self.result)
        with suppress(OSError):
            self.result.rename(_damaged(self.result))
        return None

    def try_lock(self) -> bool:
        """Keep other processes from training here, until release() or this process's end. False if one is."""
        self._lock = (self.path / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.release()
            return False
        return True

    def lock(self) -> None:
        """try_lock, or a UserError."""
        if not self.try_lock():
            raise UserError(
                f"run folder {self.path}: another process is training in it; wait for it, or stop it first"
            )

    def release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_lock": None}  # what other ranks get: the first alone holds the lock

    def write_config(self, config: Config, deepspeed: dict[str, Any], start: Mapping[str, Any]) -> None:
        """What the run is from now on. start: what history.jsonl is to say of it besides: these files say
        only the last."""
        recipe, made_on = config.model_dump(mode="json"), environment()
        write_text(self.path / "config.yaml", dump_recipe(recipe))
        write_text(self.path / "deepspeed.json", json.dumps(deepspeed, indent=1) + "\n")
        write_text(self.path / "env.json", json.dumps(made_on, indent=1) + "\n")
        line = {"time": time.strftime("%Y-%m-%d %H:%M:%S %z"), **start, "config": recipe, "env": made_on}
        with self.history.open("ab+") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
            cut_short = file.read(1) not in (b"", b"\n")  # by a crash
            file.write(b"\n" * cut_short + json.dumps(line).encode() + b"\n")

    def write_result(self, result: dict[str, Any]) -> None:
        write_text(self.result, json.dumps(result, indent=1) + "\n")

    def write_kernels(self, records: list[dict[str, Any]]) -> None:
        write_text(self.kernels, json.dumps(records, indent=1) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl. A last line cut short by a crash is left out; so are damaged ones,
        with a warning, and a copy of the file is kept."""
        try:
            *lines, last = self.metrics.read_bytes().split(b"\n")
        except FileNotFoundError:
            return []
        found = [record for line in lines if line and (record := _record_in(line)) is not None]
        if len(found) < len([line for line in lines if line]):
            kept = _damaged(self.metrics)
            log.warning("lines of %s cannot be read and are left out; %s keeps them", self.metrics, kept.name)
            with suppress(OSError):
                shutil.copyfile(self.metrics, kept)
        whole = _record_in(last)
        return found if whole is None else [*found, whole]


def _damaged(path: Path) -> Path:
    return path.with_name(f"{path.name}.damaged")


def _record_in(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
        numbers = [record[key] for key in _NUMBERS[record["kind"]]]
        return record if record["phase"] in ("dense", "sparse") and _are_numbers(numbers) else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _is_result(result: Any) -> bool:
    if not isinstance(result, Mapping) or not {DENSE_TWIN, SPARSE} <= result.keys():
        return False
    rows = [result[key] for key in (DENSE_TWIN, SPARSE, FINETUNED_DENSE) if result.get(key) is not None]
    return all(isinstance(row, Mapping) and _are_numbers([row.get(key) for key in _ROW]) for row in rows)


def _are_numbers(values: list[Any]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _is_free(path: Path) -> bool:
    """Whether no process is training in the run folder."""
    run = RunDir(path)
    try:
        return run.try_lock()
    except OSError:
        return False
    finally:
        run.release()


def is_finished(run: RunDir, config: Config) -> bool:
    """Whether nothing that `config` asks for is left to do in a run's folder."""
    result = run.read_result()
    return result is not None and (not config.finetune_dense or FINETUNED_DENSE in result)


def create(config: Config, path: Path | None = None) -> RunDir:
    """Make the folder of a new run, at `path` or below run_root. Raises UserError where that fails, and
    EnvironmentFailure where the disk is full."""
    if path is not None:
        with as_user_error(f"the run folder {path} cannot be written"):
            path.mkdir(parents=True, exist_ok=True)
        return RunDir(path)
    parent = user_path(config.run_root) / config.name
    stamp = time.strftime("%Y%m%d-%H%M%S")
    with as_user_error(f"run_root {config.run_root}: the run folder cannot be written"):
        parent.mkdir(parents=True, exist_ok=True)
        for suffix in ("", *(f"-{n}" for n in range(2, 1000))):
            made = parent / f"{stamp}{suffix}"
            with suppress(FileExistsError):
                made.mkdir()
                break
    return RunDir(made)


def find_resumed(config: Config, path: Path | None = None) -> tuple[RunDir, Path] | None:
    """The run folder and the training state that `resume` names: a run folder, a checkpoint in one, or
    "auto", the newest unfinished run of this name if there is one. None: a fresh start. Raises UserError.

    path: look in this run folder instead.
    """
    if path is not None:
        state = newest_whole(path / "checkpoints")
        return None if state is None else (RunDir(path), state)
    if config.resume is None:
        return None
    path = user_path(config.resume)
    if config.resume == "auto":
        return _newest_unfinished(config)
    if path.name.startswith("step-"):
        run, state = RunDir(path.resolve().parent.parent), path
    else:
        run, newest = RunDir(path), newest_whole(path / "checkpoints")
        if newest is None:
            raise UserError(f"resume {config.resume}: no whole checkpoint in {path / 'checkpoints'}")
        state = newest
    if difference := _other_beginning(run, config):
        raise UserError(f"resume {config.resume}: {difference}; leave that out, or begin a new run")
    return run, state


def _newest_unfinished(config: Config) -> tuple[RunDir, Path] | None:
    """Of the runs of this name that have a whole training state, the one that was trained last. By when its
    states were written: a clock may have been wrong as a folder got its name. Raises UserError where that run
    is still being trained: a second one beside it is not what was asked for."""
    states = (user_path(config.run_root) / config.name).glob("*/checkpoints/step-*")
    newest: dict[Path, float] = {}
    for state in states:
        with suppress(OSError):
            folder = state.parent.parent
            newest[folder] = max(newest.get(folder, 0.0), state.stat().st_mtime)
    for path in sorted(newest, key=lambda each: (newest[each], each), reverse=True):
        run = RunDir(path)
        if is_finished(run, config) or _other_beginning(run, config):
            continue
        if not _is_free(path):
            raise UserError(
                f"resume auto: another process is training in {path}; wait for it or stop it, or begin a new "
                "run without resume=auto"
            )
        if (whole := newest_whole(run.checkpoints)) is not None:
            return run, whole
    return None


def _other_beginning(run: RunDir, config: Config) -> str | None:
    """How the run in that folder began otherwise than the configuration says, if it did."""
    try:
        began = read_yaml(run.path / "config.yaml")
        theirs = (began["checkpoint"], began["model"]["weights"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    for key, then, now in zip(
        ("checkpoint", "model.weights"), theirs, (config.checkpoint, config.model.weights), strict=True
    ):
        if now is not None and now != then:
            return f"that run began with {key}={then}, not with {now}"
    return None


def read_branching_state(checkpoint: str) -> tuple[Path, dict[str, Any]]:
    """The folder and the training state that `checkpoint` names: a checkpoint, or a run folder, which means
    its dense twin. Raises UserError."""
    path = user_path(checkpoint)
    twin = path / "checkpoints" / DENSE_TWIN
    path = twin if twin.is_dir() else path
    if not path.is_dir():
        raise UserError(f"checkpoint {checkpoint}: no such folder; name a run folder or a checkpoint in it")
    try:
        return path, read(path, STATE)
    except CheckpointError as error:
        raise UserError(
            f"checkpoint {checkpoint}: {error}; for weights alone there is model.weights={checkpoint}"
        ) from error
