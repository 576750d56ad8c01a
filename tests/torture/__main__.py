"""python -m tests.torture: a table of what was done to runs, and how often they stood it.

Claims are counted n of n; the exit code is 1 where one falls short. Runs are tiny: what is tested is the
order in which things happen, not their size. Single ranks run side by side, each on a core of its own.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.shared.record import RESULTS, settings, show_table, write_record
from tests.conftest import write_fashion_idx
from tests.torture import damage, disk, fuzz, hostile, kills, leaks

# By their keys in the record; README and docs/security.md show them
CLAIMS = {
    "killed": "SIGKILL at any time, within saves, switches, steps, evaluations: the same bits in the end",
    "killed_two_ranks": "the same with two ranks",
    "stopped": "SIGTERM, SIGHUP, SIGUSR1, SIGINT: saved, told by the exit code, the same bits in the end",
    "stopped_two_ranks": "the same, sent to one of two ranks",
    "disk": "a full disk: told, nothing saved is lost, the same bits once there is room",
    "damaged": "a run's files with flipped bits, cut short, emptied, removed: refused, or nothing changed",
    "hostile": "pickles, npz, safetensors, YAML, tars made to harm: nothing executed, no traceback",
    "recipes": "recipes made up by hypothesis: taken, or refused in words",
    "leaks": "epochs that hold no more memory, files, threads, processes than the first 40",
}
ONLY_TWO = ("killed_two_ranks", "stopped_two_ranks")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.torture", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--kills", type=int, default=100, metavar="N", help="a fifth of them on two ranks")
    parser.add_argument("--damages", type=int, default=1000, metavar="N", help="to files of a run")
    parser.add_argument("--recipes", type=int, default=2000, metavar="N", help="that are made up")
    parser.add_argument("--epochs", type=int, default=240, metavar="N", help="of the long run")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--only", nargs="+", choices=list(CLAIMS), default=list(CLAIMS), metavar="CLAIM")
    parser.add_argument("--out", type=Path, default=RESULTS / "torture.json", metavar="FILE")
    options = parser.parse_args(arguments)
    begin, counted = time.monotonic(), {}
    with tempfile.TemporaryDirectory() as folder:
        for key, outcomes in _claims(Path(folder), options):
            counted[key] = _count(key, outcomes)
    show_table(
        ("claim", "stood", "of", "seconds"),
        [
            (each["claim"], f"{each['stood']:,}", f"{each['of']:,}", f"{each['seconds']:,.0f}")
            for each in counted.values()
        ],
        ("claim",),
    )
    content = {"settings": settings(options), "claims": counted, "seconds": time.monotonic() - begin}
    if set(counted) == set(CLAIMS) or options.out != RESULTS / "torture.json":  # a part is no record
        write_record(options.out, content)
    return 0 if all(each["stood"] == each["of"] for each in counted.values()) else 1


def _claims(folder: Path, options: argparse.Namespace) -> Iterator[tuple[str, Iterator[bool]]]:
    """The wanted claims, and the outcomes of each, which are found as they are read."""
    data, seed, on_two = write_fashion_idx(folder / "data", 320, 150), options.seed, options.kills // 5
    alone = kills.left_alone(data, folder / "alone", 1)
    pair = kills.left_alone(data, folder / "pair", 2) if set(options.only) & set(ONLY_TWO) else alone
    begun: dict[str, Any] = {
        "killed": lambda: kills.killed(data, folder / "killed", alone, 1, options.kills - on_two, seed),
        "killed_two_ranks": lambda: kills.killed(data, folder / "killed", pair, 2, on_two, seed),
        "stopped": lambda: kills.stopped(data, folder / "stopped", alone, 1, kills.SIGNALS, seed),
        "stopped_two_ranks": lambda: kills.stopped(data, folder / "stopped", pair, 2, kills.OF_SLURM, seed),
        "disk": lambda: disk.full(data, folder / "disk", alone, seed),
        "damaged": lambda: damage.damaged(alone.run, folder / "damaged", options.damages, seed),
        "hostile": lambda: hostile.hostile(folder / "scratch"),
        "recipes": lambda: fuzz.recipes(options.recipes, seed),
        "leaks": lambda: leaks.held(data, folder / "leaks", options.epochs),
    }
    for key in CLAIMS:
        if key in options.only:
            yield key, begun[key]()


def _count(key: str, outcomes: Iterator[bool]) -> dict[str, Any]:
    begin, stood, number = time.monotonic(), 0, 0
    for number, outcome in enumerate(outcomes, 1):
        stood += outcome
        print(f"\r{CLAIMS[key]}: {stood} of {number}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return {"claim": CLAIMS[key], "stood": stood, "of": number, "seconds": time.monotonic() - begin}


if __name__ == "__main__":
    sys.exit(main())
