"""The folder of a run and the small files in it.

runs/<name>/<time>/  config.yaml     the resolved configuration
                     deepspeed.json  what DeepSpeed was given
                     env.json        versions, hardware, revision, command
                     metrics.jsonl   a line per epoch and per logged step
                     tb/             the same for TensorBoard
                     checkpoints/    training states, dense_twin, sparse
                     masks/          of every compression, where save.mask_history asks for them
                     finetuned_dense/  a run folder of its own: the dense twin, trained on (finetune_dense)
                     result.json     the closing table's figures
                     report.html     curves
                     kernels.json    sparse against dense, a layer each, where kernels were measured
"""

from __future__ import annotations

import fcntl
import json
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from data.atomic import write_text
from trainer.checkpoints.checkpoint import STATE, CheckpointError, newest_whole, read
from trainer.checkpoints.environment import environment
from trainer.config.recipes import dump_recipe, read_yaml
from trainer.config.schema import Config
from trainer.errors import UserError

DENSE_TWIN, SPARSE = "dense_twin", "sparse"
FINETUNED_DENSE = "finetuned_dense"


class RunDir:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.tensorboard = path / "tb"
        self.metrics = path / "metrics.jsonl"
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
        return json.loads(self.result.read_text(encoding="utf-8")) if self.result.exists() else None

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

    def write_config(self, config: Config, deepspeed: dict[str, Any]) -> None:
        write_text(self.path / "config.yaml", dump_recipe(config.model_dump(mode="json")))
        write_text(self.path / "deepspeed.json", json.dumps(deepspeed, indent=1) + "\n")
        write_text(self.path / "env.json", json.dumps(environment(), indent=1) + "\n")

    def write_result(self, result: dict[str, Any]) -> None:
        write_text(self.result, json.dumps(result, indent=1) + "\n")

    def write_kernels(self, records: list[dict[str, Any]]) -> None:
        write_text(self.kernels, json.dumps(records, indent=1) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; a last line cut short by a crash is left out."""
        lines = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines() if self.metrics.exists() else []:
            try:
                lines.append(json.loads(line))
            except ValueError:
                continue
        return lines


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
    """Make the folder of a new run, at `path` or below run_root. Raises UserError where that fails."""
    if path is not None:
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"the run folder {path} cannot be written: {error}") from error
        return RunDir(path)
    parent = Path(config.run_root).expanduser() / config.name
    stamp = time.strftime("%Y%m%d-%H%M%S")
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for suffix in ("", *(f"-{n}" for n in range(2, 1000))):
            made = parent / f"{stamp}{suffix}"
            with suppress(FileExistsError):
                made.mkdir()
                break
    except OSError as error:
        raise UserError(f"run_root {config.run_root}: the run folder cannot be written: {error}") from error
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
    path = Path(config.resume).expanduser()
    if config.resume == "auto":
        states = sorted((Path(config.run_root).expanduser() / config.name).glob("*/checkpoints/step-*"))
        runs = sorted({state.parent.parent for state in states})
        unfinished = [
            run
            for run in runs
            if not is_finished(RunDir(run), config)
            and _is_free(run)
            and not _other_beginning(RunDir(run), config)
        ]
        if not unfinished:
            return None
        path = unfinished[-1]
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
    path = Path(checkpoint).expanduser()
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
