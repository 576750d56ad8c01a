"""What freed memory costs on a CPU: steps with it kept, as the trainer does, and given back, as glibc does.

Each way runs in a process of its own, which counts its page faults; see trainer.distributed.host_memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from benchmarks.models import NETWORKS, Ours, one_batch, short_run
from benchmarks.record import console, parse, show_spread, spread, write_record
from benchmarks.turns import order

WAYS = ("given back", "kept")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="acdc bench host_memory", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "networks", nargs="*", metavar="NETWORK", help=f"of {', '.join(NETWORKS)}; default: all"
    )
    add = partial(parser.add_argument, metavar="N", type=int)
    add("--repeats", default=3, help="processes of each way, in turns; default: 3")
    add("--steps", default=6, help="in a process; default: 6")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)  # in a process of its own
    options = parse(parser, "host_memory")
    if options.way:
        print(json.dumps(measure(options.networks[0], options.way, options.steps)))
        return 0
    results = {name: _in_turns(name, options) for name in options.networks or NETWORKS}
    table = Table(title="freed memory")
    for column in ("network", "way", "step, ms", "page faults a step", "GB"):
        table.add_column(column, justify="left" if column in ("network", "way") else "right")
    for name, ways in results.items():
        for way, result in ways.items():
            faults, memory = f"{result['faults']:,.0f}", f"{result['memory_gb']:.1f}"
            table.add_row(name, way, show_spread(result["ms_per_step"]), faults, memory)
    console().print(table)
    write_record(options.out, {"host_memory": results})
    return 0


def _in_turns(name: str, options: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for repeat in range(options.repeats):
        for way in order(WAYS, repeat):
            command = [sys.executable, "-m", "benchmarks.host_memory", name, "--way", way]
            command += ["--steps", str(options.steps)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found[way].append(json.loads(done.stdout.splitlines()[-1]))
        print(f"{name}: {repeat + 1} of {options.repeats}", flush=True)
    return {
        way: {
            "ms_per_step": spread([ms for run in runs for ms in run["ms"]]),
            "faults": sum(run["faults"] for run in runs) / len(runs),
            "memory_gb": max(run["memory_gb"] for run in runs),
        }
        for way, runs in found.items()
    }


def measure(name: str, way: str, steps: int) -> dict[str, Any]:
    """Milliseconds of steps, page faults a step, greatest memory."""
    from trainer.build import build_trainer
    from trainer.distributed import ranks

    if way == "given back":
        vars(ranks)["retain_freed_memory"] = lambda: False
    device, network = ranks.start(), NETWORKS[name]
    with tempfile.TemporaryDirectory() as folder:
        config = short_run(network, Path(folder), "sparse 2", network.batch(device), steps + 3)
        trainer = build_trainer(config, device)
        try:
            ours, batch, seconds = Ours(trainer), one_batch(trainer), []
            for _ in range(3):
                ours.step(batch)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for _ in range(steps):
                begin = time.perf_counter()
                ours.step(batch)
                seconds.append(time.perf_counter() - begin)
            after = resource.getrusage(resource.RUSAGE_SELF)
        finally:
            trainer.close()
    assert not torch.cuda.is_available(), "a CPU's memory is measured"
    faults = (after.ru_minflt - before) / steps
    return {"ms": [1000 * s for s in seconds], "faults": faults, "memory_gb": after.ru_maxrss / 1e6}


if __name__ == "__main__":
    raise SystemExit(main())
