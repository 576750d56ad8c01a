"""What this machine has for training: what is missing, what it would be for, and what puts it right."""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from data.places import data_home
from trainer.checkpoints.environment import installed_version
from trainer.errors import EnvironmentFailure

LITTLE_DISK, LITTLE_SHARED = 10e9, 1e9  # bytes
# What works without them, and what does not
OPTIONAL = (
    ("timm", "model.name=timm:NAME", "timm"),
    ("onnx", "acdc export --format onnx", "onnx"),
    ("onnxscript", "acdc export --format onnx", "onnx"),
    ("wandb", "log.wandb", "wandb"),
    ("scipy", "the class table of ImageNet's development kit", ""),
)


class Finding(NamedTuple):
    """mend: what to do about it, empty where all is well. needed: nothing trains without it."""

    what: str
    found: str
    mend: str = ""
    needed: bool = False


def doctor(options: argparse.Namespace) -> int:
    """What this machine has for training, and what is missing, for what, and how to get it."""
    from trainer.checkpoints.environment import environment

    findings = list(examine(environment()))
    for each in findings:
        mark = "-" if each.mend else " "
        print(f"{mark} {each.what:22} {each.found}{f'  -> {each.mend}' if each.mend else ''}")
    if missing := [each.what for each in findings if each.needed]:
        names = ", ".join(missing)
        raise EnvironmentFailure(f"missing packages: {names}; pip install 'acdc-train[train]'")
    return 0


def examine(found: dict[str, Any]) -> Iterator[Finding]:
    """found: trainer.checkpoints.environment's."""
    for key in ("python", "platform", "cpu", "cpu_cores"):
        yield Finding(key, str(found[key]))
    yield _gpus(found)
    auto = "bf16" if found["gpus"] or found["cpu_bf16"] else "fp32"
    yield Finding("engine.precision=auto", auto)
    for package, version in found["packages"].items():
        mend = "" if version else "nothing trains without it"
        yield Finding(package, version or "missing", mend, needed=version is None)
    for package, purpose, extra in OPTIONAL:
        install = f"pip install 'acdc-train[{extra}]'" if extra else f"pip install {package}"
        version = installed_version(package)
        yield Finding(package, version or "missing", "" if version else f"for {purpose}: {install}")
    if found["packages"]["torch"] is not None:
        yield _compilation(bool(found["gpus"]))
    yield from _room()


def _gpus(found: dict[str, Any]) -> Finding:
    if found["gpus"]:
        return Finding("gpus", f"{', '.join(found['gpus'])}, CUDA {found['cuda']}")
    if not Path("/dev/nvidiactl").exists():
        return Finding("gpus", "none")
    if found["cuda"] is None:
        return Finding("gpus", "there, but torch is built for CPUs", "install torch's build for CUDA 13")
    return Finding("gpus", "there, but torch sees none", "see nvidia-smi and CUDA_VISIBLE_DEVICES")


def _compilation(on_gpu: bool) -> Finding:
    from trainer.engine import missing_for_compilation

    needed = missing_for_compilation("cuda" if on_gpu else "cpu")
    if needed is None:
        return Finding("torch.compile", "works")
    kernels = "" if on_gpu else ", without sparse kernels"
    return Finding("torch.compile", f"needs a {needed}", f"until then models run uncompiled, slower{kernels}")


def _room() -> Iterator[Finding]:
    """Free bytes where runs, data and the batches of worker processes lie."""
    places = (
        ("disk, this folder", Path.cwd(), LITTLE_DISK, "checkpoints of large models take some GB"),
        ("disk, data home", data_home(), LITTLE_DISK, "packed data sets and compiled graphs: $ACDC_DATA"),
        ("shared memory", Path("/dev/shm"), LITTLE_SHARED, "data.backend=torch needs it; docker: --shm-size"),
    )
    for what, path, little, why in places:
        there = next((each for each in (path, *path.parents) if each.exists()), None)
        if there is None:
            continue
        free = shutil.disk_usage(there).free
        writable = os.access(there, os.W_OK)
        mend = "not writable" if not writable else why if free < little else ""
        yield Finding(what, f"{free / 1e9:,.1f} GB free in {path}", mend)
