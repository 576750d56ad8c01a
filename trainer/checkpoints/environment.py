"""What this process runs on and with: the provenance of a run or a benchmark record."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RECORDS = "benchmarks/results"
CHANGES = "+changes"  # behind a revision that the tree differs from
PACKAGES = (
    *("torch", "torchvision", "deepspeed", "nvidia-dali-cuda130", "numpy", "tensorboard"),
    *("pyyaml", "pydantic", "rich", "matplotlib", "psutil"),
)


def environment() -> dict[str, Any]:
    """Versions, hardware, revision and command of this process."""
    try:
        import torch

        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        cuda, cpu_bf16 = torch.version.cuda, cpu_multiplies_bf16()
    except ModuleNotFoundError:
        gpus, cuda, cpu_bf16 = [], None, False
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: installed_version(name) for name in PACKAGES},
        "cuda": cuda,
        "gpus": gpus,
        "cpu": _cpu(),
        "cpu_cores": len(os.sched_getaffinity(0)),
        "cpu_bf16": cpu_bf16,
        "revision": revision(),
    }


def cpu_multiplies_bf16() -> bool:
    """Whether the CPU has instructions for it, and torch uses them; without, bf16 is slower than float32."""
    import torch

    has = torch.cpu.get_capabilities()
    if has.get("avx512_bf16") or has.get("amx_bf16"):  # not so where ATEN_CPU_CAPABILITY asks for avx2
        allowed = torch.backends.cpu.get_cpu_capability() == "AVX512"
    else:
        allowed = bool(has.get("bf16"))  # ARM's extension
    # oneDNN has the kernels
    return allowed and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


def installed_version(package: str) -> str | None:
    """None where it is not installed."""
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


def revision(root: Path = ROOT) -> str | None:
    """The git revision of the code, with CHANGES where the tree differs from it; None outside a checkout.

    Records of benchmarks (RECORDS) are not code: writing one changes nothing that the next one measures."""
    if not (root / ".git").exists():  # else git would name the repository around an installed package
        return None
    try:
        head, changes = (
            subprocess.run(["git", *command], cwd=root, capture_output=True, text=True, check=True).stdout
            for command in (
                ("rev-parse", "HEAD"),
                ("status", "--porcelain", "--", ".", f":(exclude){RECORDS}"),
            )
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.strip() + (CHANGES if changes.strip() else "")
