"""python -m tests.torture: a table of what was done to runs, and how often they stood it.

Claims are counted n of n; the exit code is 1 where one falls short. Runs are tiny: what is tested is the
order in which things happen, not their size.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.conftest import write_fashion_idx
from tests.torture import damage, fuzz, kills


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.torture", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--kills", type=int, default=100, metavar="N", help="a fifth of them on two ranks")
    parser.add_argument("--damages", type=int, default=1000, metavar="N", help="to files of a run")
    parser.add_argument("--recipes", type=int, default=2000, metavar="N", help="with nonsense in them")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    options = parser.parse_args(arguments)
    table = Table("claim", title=f"torture, seed {options.seed}", title_justify="left")
    for column in ("stood", "of", "seconds"):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as folder:
        outcomes = [_count(table, *claim) for claim in _claims(Path(folder), options)]
    Console(width=100).print(table)
    return 0 if all(outcomes) else 1


def _claims(folder: Path, options: argparse.Namespace) -> Iterator[tuple[str, Iterator[bool]]]:
    """What is claimed, and its outcomes, which are found as they are read."""
    generator = random.Random(options.seed)
    data = write_fashion_idx(folder / "data", 320, 150)
    alone, seconds = kills.left_alone(data, folder / "alone", 1)
    on_two = options.kills // 5
    yield (
        "killed at any moment: ends with the same bits",
        kills.killed(data, folder / "killed", alone, seconds, 1, options.kills - on_two, generator),
    )
    if on_two:
        pair, longer = kills.left_alone(data, folder / "pair", 2)
        yield (
            "killed at any moment on two ranks: ends with the same bits",
            kills.killed(data, folder / "killed", pair, longer, 2, on_two, generator),
        )
    yield (
        "SIGTERM, SIGHUP, SIGUSR1: saved, told, ends with the same bits",
        kills.stopped(data, folder / "signals", alone, seconds, generator),
    )
    yield (
        "a file of a run damaged: refused, or nothing changed",
        damage.damaged(alone, folder / "damaged", options.damages, generator),
    )
    yield "a file that would execute something: nothing executed", damage.hostile(folder)
    yield "a made-up recipe: taken, or refused in words", fuzz.recipes(options.recipes, options.seed)


def _count(table: Table, claim: str, outcomes: Iterator[bool]) -> bool:
    begin, stood, number = time.monotonic(), 0, 0
    for number, outcome in enumerate(outcomes, 1):
        stood += outcome
        print(f"\r{claim}: {stood} of {number}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    table.add_row(claim, f"{stood:,}", f"{number:,}", f"{time.monotonic() - begin:,.0f}")
    return stood == number


if __name__ == "__main__":
    sys.exit(main())
