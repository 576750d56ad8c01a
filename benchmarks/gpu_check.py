"""Everything that needs a GPU, in one command and within a time: tests/gpu, one real run, the benchmarks.

Parts run by what their figures are worth, those of which no record holds any first, and tests/gpu, which have
run before and have time kept for them, last. Each writes its record as soon as it has a figure, so that a
budget that ends, a part that fails and a machine that goes lose nothing. No network: what is not installed is
left out, and said with what it costs in evidence. The folder has gpu_check.json (outcomes, and the records of
the small parts), the records of the others, tests.log (what tests/gpu said) and log.txt (what the rest said).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, NoReturn

from benchmarks.shared.record import RESULTS, write_record
from trainer.errors import exit_code_of

BUDGET = 510  # seconds for all
KEPT = 100  # of them, which tests take


@dataclass(frozen=True)
class Part:
    """needs: packages. least: seconds that it is worth beginning with; most: when it is stopped. evidence:
    what has no figure without it. small: its record goes into gpu_check.json. budget: takes --seconds."""

    name: str
    needs: tuple[str, ...]
    least: int
    most: int
    command: str
    evidence: str
    small: bool = False
    budget: bool = False


TRAINER = ("deepspeed", "pydantic", "yaml", "tensorboard", "rich", "psutil")
DATA = (*TRAINER, "nvidia.dali", "PIL")
COMMANDS = {
    "throughput": "benchmarks.throughput resnet50 --images 2048 --turns 3 --warmup 3 --profile",
    "data": "benchmarks.data_pipeline --images 2048 --batches 64 --repeats 2",
    "kernels24": "benchmarks.kernels24",
    "throughput24": "benchmarks.throughput --images 0 --pattern '2:4 transposable' --turns 2",
    "phase_switch": "benchmarks.phase_switch --repeats 5",
    "variants": "benchmarks.variants --only as_is fast_stem fast_stem+batch_512 combo_kernels zero1 "
    "max_autotune_gemm coordinate_descent combo_kernels+batch_512",
    "real_run": "benchmarks.gpu.real_run",
    "overhead": "benchmarks.overhead resnet50 mobilenetv1",
    "overhead_wrn": "benchmarks.overhead wrn-28-10",
    "peers": "benchmarks.peers resnet50 --turns 3 --steps 24",
    "compilation": "benchmarks.compilation resnet50 --repeats 1",
    "tests": "pytest -q -W ignore tests/gpu",
}
Small = partial(Part, small=True)
# A ResNet50's first graph takes 16 cores more than a minute, the same one later some seconds: throughput
# makes the one that variants, real_run and overhead begin with
PARTS = (
    Part("throughput", TRAINER, 60, 200, COMMANDS["throughput"], "images/s, and where a step's time goes"),
    Small("data", DATA, 40, 100, COMMANDS["data"], "which decoder is fastest"),
    Part("kernels24", ("rich",), 20, 75, COMMANDS["kernels24"], "2:4 kernels"),
    Small("throughput24", TRAINER, 60, 150, COMMANDS["throughput24"], "2:4 steps"),
    Small("phase_switch", TRAINER, 30, 75, COMMANDS["phase_switch"], "phase switches and graphs over phases"),
    Part("variants", TRAINER, 60, 240, COMMANDS["variants"], "what settings gain", budget=True),
    Part("real_run", DATA, 60, 150, COMMANDS["real_run"], "training from files, killed and resumed"),
    Small("overhead", TRAINER, 60, 120, COMMANDS["overhead"], "what masks cost against stock layers"),
    Small("overhead_wrn", DATA, 40, 90, COMMANDS["overhead_wrn"], "the same of WRN-28-10"),
    Small("peers", DATA, 60, 150, COMMANDS["peers"], "peers"),
    Small("compilation", TRAINER, 60, 240, COMMANDS["compilation"], "what compiling costs"),
    Part("tests", ("pytest",), 20, 150, COMMANDS["tests"], "what tests/gpu hold"),
)
NAMES = tuple(part.name for part in PARTS)


def main() -> int:
    doc = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=doc)
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu", metavar="FOLDER")
    parser.add_argument("--only", nargs="+", choices=NAMES, metavar="NAME", help=f"of {', '.join(NAMES)}")
    budget = f"for all; default: {BUDGET}"
    parser.add_argument("--seconds", type=int, default=BUDGET, metavar="N", help=budget)
    options = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("gpu-check: left out, torch sees no GPU on this machine")
        return 0
    signal.signal(signal.SIGTERM, _stop)
    print(f"gpu-check on {torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    outcomes = check(options.out, options.only or NAMES, options.seconds)
    for name, found in outcomes.items():
        print(f"{name:16} {found['seconds']:5.0f} s   {found['outcome']}")
    return int(any(found["outcome"].startswith("failed") for found in outcomes.values()))


def check(out: Path, only: tuple[str, ...] | list[str], seconds: float) -> dict[str, dict[str, Any]]:
    """Seconds and outcome of every part, by name; gpu_check.json says so after each. seconds: for all."""
    out.mkdir(parents=True, exist_ok=True)
    end, outcomes, records = time.monotonic() + seconds, dict[str, dict[str, Any]](), dict[str, Any]()
    for part in PARTS:
        if part.name not in only:
            continue
        last = part.name == "tests"
        left = end - time.monotonic() - (KEPT if "tests" in only and not last else 0)
        with (out / ("tests.log" if last else "log.txt")).open("a", encoding="utf-8") as log:
            spent, outcome = run(part, left, out, log)
        outcomes[part.name] = {"seconds": spent, "outcome": outcome, "command": part.command}
        place = out / f"{part.name}.json"
        if part.small and place.exists():
            records[part.name] = json.loads(place.read_text(encoding="utf-8"))
        content = {"seconds": seconds, "parts": outcomes, "records": records}
        write_record(out / "gpu_check.json", content, quietly=True)
        if part.small:
            place.unlink(missing_ok=True)
    return outcomes


def run(part: Part, left: float, out: Path, log: IO[str]) -> tuple[float, str]:
    """(seconds, "passed", "failed: why" or "left out: why"). left: seconds that it may take of the budget.
    log: gets what the part says, as the screen does."""
    without = f": no figure of {part.evidence}"
    if missing := [package for package in part.needs if not _installed(package)]:
        return 0, f"left out: {', '.join(missing)} not installed{without}"
    if left < part.least:
        return 0, f"left out: {max(left, 0):.0f} s are left of the time for all{without}"
    command = [sys.executable, "-m", *shlex.split(part.command)]
    limit = min(left, part.most)
    if part.name != "tests":
        (out / f"{part.name}.json").unlink(missing_ok=True)  # of an earlier check
        command += ["--out", str(out / f"{part.name}.json")]
    if part.budget:
        command += ["--seconds", str(int(limit) - 15)]  # behind which it ends by itself
    begin, environment = time.monotonic(), {**os.environ, "ACDC_TEST_GPU": "1", "PYTHONUNBUFFERED": "1"}
    log.write(f"\n===== {part.name}: {shlex.join(command)}\n")
    process = subprocess.Popen(
        command,
        env=environment,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    echo = threading.Thread(target=_echo, args=(process, log), daemon=True)
    echo.start()
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        code = None
    finally:
        with suppress(ProcessLookupError):
            # and what it has started; no SIGTERM, at which a run saves first, and a test that trains goes on
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        echo.join(10)  # longer where something that it started has got away with the pipe
    spent = time.monotonic() - begin
    if code is None:
        kept = "; what it had measured is kept" if (out / f"{part.name}.json").exists() else without
        late = "left out: the time for all is over" if left < part.most else "failed: it took too long"
        return spent, f"{late}{kept}"
    return spent, "passed" if code == 0 else f"failed: exit code {code}"


def _stop(number: int, frame: Any) -> NoReturn:
    """Let whatever stops the check stop the part that runs: see the end of `run`."""
    raise SystemExit(128 + number)


def _echo(process: subprocess.Popen[str], log: IO[str]) -> None:
    assert process.stdout is not None
    with process.stdout as said:
        for line in said:
            print(line, end="", flush=True)
            log.write(line)
            log.flush()


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of a parent
        return False


if __name__ == "__main__":
    raise SystemExit(exit_code_of(main))
