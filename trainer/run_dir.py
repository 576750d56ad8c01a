"""The folder of a run and the small files in it.

runs/<name>/<time>/  config.yaml     the resolved configuration
                     deepspeed.json  what DeepSpeed was given
                     env.json        versions, hardware, revision, command
                     metrics.jsonl   a line per epoch and per logged step
                     tb/             the same for TensorBoard
                     checkpoints/    training states, dense_twin, sparse
                     result.json     the closing table's figures
                     report.html     curves
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml

from trainer.checkpoint import newest_whole, write_text
from trainer.config import Config
from trainer.errors import UserError

PACKAGES = ("acdc-train", "torch", "torchvision", "deepspeed", "nvidia-dali-cuda130", "numpy", "tensorboard")
DENSE_TWIN, SPARSE = "dense_twin", "sparse"


class RunDir:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.tensorboard = path / "tb"
        self.metrics = path / "metrics.jsonl"
        self.result = path / "result.json"
        self.report = path / "report.html"

    def write_config(self, config: Config, deepspeed: dict[str, Any]) -> None:
        write_text(self.path / "config.yaml", yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
        write_text(self.path / "deepspeed.json", json.dumps(deepspeed, indent=1) + "\n")
        write_text(self.path / "env.json", json.dumps(environment(), indent=1) + "\n")

    def write_result(self, result: dict[str, Any]) -> None:
        write_text(self.result, json.dumps(result, indent=1) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; a last line cut short by a crash is left out."""
        lines = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines() if self.metrics.exists() else []:
            try:
                lines.append(json.loads(line))
            except ValueError:
                continue
        return lines


def create(config: Config) -> RunDir:
    """Make the folder of a new run. Raises UserError where it cannot be written."""
    parent = Path(config.run_root).expanduser() / config.name
    stamp = time.strftime("%Y%m%d-%H%M%S")
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for suffix in ("", *(f"-{n}" for n in range(2, 1000))):
            try:
                (parent / f"{stamp}{suffix}").mkdir()
            except FileExistsError:
                continue
            break
        path = parent / f"{stamp}{suffix}"
    except OSError as error:
        raise UserError(f"run_root {config.run_root}: the run folder cannot be written: {error}") from error
    return RunDir(path)


def find_resumed(config: Config) -> tuple[RunDir, Path] | None:
    """The run folder and the training state that `resume` names: a run folder, a checkpoint in one, or
    "auto", the newest unfinished run of this name if there is one. None: a fresh start. Raises UserError."""
    if config.resume is None:
        return None
    path = Path(config.resume).expanduser()
    if config.resume == "auto":
        states = sorted((Path(config.run_root).expanduser() / config.name).glob("*/checkpoints/step-*"))
        unfinished = [run for state in states if not (RunDir(run := state.parent.parent)).result.exists()]
        if not unfinished:
            return None
        path = unfinished[-1]
    if path.name.startswith("step-"):
        return RunDir(path.resolve().parent.parent), path
    state = newest_whole(path / "checkpoints")
    if state is None:
        raise UserError(f"resume {config.resume}: no whole training checkpoint in {path / 'checkpoints'}")
    return RunDir(path), state


def environment() -> dict[str, Any]:
    """Versions, hardware, revision and command of this process."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "gpus": gpus,
        "cpu": _cpu(),
        "cpu_cores": len(os.sched_getaffinity(0)),
        "revision": _revision(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )


def _revision() -> str | None:
    """The git revision of the code, with "+changes" where the tree differs from it; None outside a
    checkout."""
    here = Path(__file__).resolve().parent.parent
    try:
        revision = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        )
        changes = subprocess.run(
            ["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return revision.stdout.strip() + ("+changes" if changes.stdout.strip() else "")
