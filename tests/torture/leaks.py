"""A long run of many short epochs, and what its process holds after each."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.torture.kills import kill, start

WARM_UP = 40  # epochs, until caches are filled
BREATH = 1.02  # of memory: what the allocator takes and gives back
LONGEST = 1200.0  # seconds


def held(data: Path, root: Path, epochs: int) -> Iterator[bool]:
    """For each epoch after the warm-up: whether the process holds no more files, threads, processes and
    memory than it did within the warm-up. Epochs are one step long, and dense and sparse in turn."""
    root.mkdir(parents=True)
    watch, said = root / "held.jsonl", root / "said.txt"
    schedule = f"sparsity.schedule=(dense 1, sparse 1) x{epochs // 2}"
    options = [f"epochs={epochs // 2 * 2}", schedule, "steps_per_epoch=1", "save.every=2st", "save.keep=2"]
    process = start(data, root, 1, min(os.sched_getaffinity(0)), *options, said=said, ACDC_WATCH=str(watch))
    code = process.wait(LONGEST)
    kill(process)
    if code != 0:
        raise RuntimeError(f"the long run ended with {code}: {said.read_text(errors='replace')[-2000:]}")
    after = [json.loads(line) for line in watch.read_text(encoding="utf-8").splitlines()]
    most = {key: max(each[key] for each in after[:WARM_UP]) for key in after[0]}
    most["memory"] *= BREATH
    for number, each in enumerate(after[WARM_UP:], WARM_UP):
        more = {key: value for key, value in each.items() if value > most[key]}
        if more:
            print(f"epoch {number}: {more}, before {most}", file=sys.stderr)
        yield not more
