"""Everything that needs a GPU, in one command and within 9 minutes: tests/gpu and all benchmarks.

No network: what is not installed is left out, and said. Records go to benchmarks/results/gpu.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.shared.record import RESULTS

BUDGET = 8.5 * 60  # seconds for all


@dataclass(frozen=True)
class Part:
    """needs: packages. least: seconds that it is worth beginning with; most: when it is stopped."""

    name: str
    needs: tuple[str, ...]
    least: int
    most: int
    command: str


TRAINER = ("deepspeed", "pydantic", "rich", "psutil")
DATA = (*TRAINER, "nvidia.dali")
PARTS = (
    Part("tests", ("pytest",), 20, 120, "pytest -q -W ignore tests/gpu"),
    Part("kernels24", ("rich",), 20, 90, "benchmarks.kernels24"),
    Part("phase_switch", TRAINER, 30, 90, "benchmarks.phase_switch"),
    Part("throughput", TRAINER, 40, 120, "benchmarks.throughput resnet50"),
    Part("throughput24", TRAINER, 40, 120, "benchmarks.throughput --images 0 --pattern '2:4 transposable'"),
    Part("overhead", TRAINER, 60, 120, "benchmarks.overhead resnet50 mobilenetv1"),
    Part("overhead_wrn", DATA, 40, 90, "benchmarks.overhead wrn-28-10"),
    Part("compilation", TRAINER, 60, 120, "benchmarks.compilation resnet50 --repeats 1"),
    Part("peers", DATA, 60, 150, "benchmarks.peers resnet50 --turns 3 --steps 24"),
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="make gpu-check", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu", metavar="FOLDER")
    options = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("gpu-check: left out, torch sees no GPU on this machine")
        return 0
    print(f"gpu-check on {torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    begin, outcomes = time.monotonic(), []
    for part in PARTS:
        left = BUDGET - (time.monotonic() - begin)
        outcomes.append((part.name, *run(part, left, options.out)))
    for name, seconds, outcome in outcomes:
        print(f"{name:16} {seconds:5.0f} s   {outcome}")
    return int(any(outcome.startswith("failed") for *_, outcome in outcomes))


def run(part: Part, left: float, out: Path) -> tuple[float, str]:
    """(seconds, "passed", "failed: why" or "left out: why"). left: seconds of the budget."""
    if missing := [package for package in part.needs if not _installed(package)]:
        return 0, f"left out: {', '.join(missing)} not installed"
    if left < part.least:
        return 0, f"left out: {left:.0f} s are left of the time for all"
    command = [sys.executable, "-m", *shlex.split(part.command)]
    if part.name != "tests":
        command += ["--out", str(out / f"{part.name}.json")]
    begin, environment = time.monotonic(), {**os.environ, "ACDC_TEST_GPU": "1"}
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        code = process.wait(min(left, part.most))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # and what it has started
        process.wait()
        late = "left out: the time for all is over" if left < part.most else "failed: it took too long"
        return time.monotonic() - begin, late
    return time.monotonic() - begin, "passed" if code == 0 else f"failed: exit code {code}"


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of a parent
        return False


if __name__ == "__main__":
    raise SystemExit(main())
