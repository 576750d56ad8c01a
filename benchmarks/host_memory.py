"""What freed memory costs on a CPU: steps with it kept, as the trainer does, and given back, as glibc does.

Each way runs in a process of its own, which counts its page faults; see trainer.distributed.host_memory.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from benchmarks.shared.models import NETWORKS, Ours, one_batch, short_trainer
from benchmarks.shared.record import Parser, parse, show_spread, show_table, spread, write_record
from benchmarks.shared.turns import repeat_ways, run_apart
from trainer.distributed import ranks
from trainer.errors import exit_code_of

WAYS = ("given back", "kept")


def main() -> int:
    parser, names = Parser("host_memory", __doc__), f"of {', '.join(NETWORKS)}; default: all"
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=names)
    parser.add_number("--repeats", 3, "processes of each way, in turns")
    parser.add_number("--steps", 6, "in a process")
    options = parse(parser, "host_memory")
    results: dict[str, dict[str, Any]] = {}
    for name in options.networks or NETWORKS:
        for found in _in_turns(name, options.repeats, options.steps):
            results[name] = found
            write_record(options.out, {"host_memory": results}, quietly=True)
    rows = []
    for name, ways in results.items():
        for way, result in ways.items():
            faults, memory = f"{result['faults']:,.0f}", f"{result['memory_gb']:.1f}"
            rows.append((name, way, show_spread(result["ms_per_step"]), faults, memory))
    columns = ("network", "way", "step, ms", "page faults a step", "GB")
    show_table(columns, rows, texts=("network", "way"), title="freed memory")
    write_record(options.out, {"host_memory": results})
    return 0


def _in_turns(name: str, repeats: int, steps: int) -> Iterator[dict[str, Any]]:
    """Of each way so far."""
    return repeat_ways(name, WAYS, repeats, lambda way: run_apart(measure, name, way, steps), summary)


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of what `measure` gave."""
    return {
        "ms_per_step": spread([ms for run in runs for ms in run["ms"]]),
        "faults": sum(run["faults"] for run in runs) / len(runs),
        "memory_gb": max(run["memory_gb"] for run in runs),
    }


def measure(name: str, way: str, steps: int) -> dict[str, Any]:
    """Milliseconds of steps, page faults a step, greatest memory."""
    if way == "given back":
        vars(ranks)["retain_freed_memory"] = lambda: False
    device, network = ranks.start(), NETWORKS[name]
    with short_trainer(network, device, "sparse 2", network.batch(device), steps + 3) as trainer:
        ours, batch, seconds = Ours(trainer), one_batch(trainer), []
        for _ in range(3):
            ours.step(batch)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(steps):
            begin = time.perf_counter()
            ours.step(batch)
            seconds.append(time.perf_counter() - begin)
        after = resource.getrusage(resource.RUSAGE_SELF)
    assert not torch.cuda.is_available(), "a CPU's memory is measured"
    faults = (after.ru_minflt - before) / steps
    return {"ms": [1000 * s for s in seconds], "faults": faults, "memory_gb": after.ru_maxrss / 1e6}


if __name__ == "__main__":
    raise SystemExit(exit_code_of(main))
