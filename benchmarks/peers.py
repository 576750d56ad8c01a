"""Ours against what a user would write instead: a tuned PyTorch loop, and a plain one.

See benchmarks.peers_loops for both. Ours: the trainer as it is, DALI included, in a compressed phase. Each
runs in a process of its own, with data of its own, and they take turns in an order that rotates: the others
wait while one trains. A turn begins and ends with the contender's read-ahead full (see
benchmarks.shared.turns), so its N steps pay for exactly N batches, and no data work falls outside. At most
READ_AHEAD of the N are made behind the last step, while the model rests; the record says which share of the
time that took ("refill").

With --before FOLDER, a checkout of an earlier commit, ours takes turns with ours as it was there: what new
code costs a step that does not use it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

from benchmarks.peers_loops import AHEAD, WORKERS
from benchmarks.shared.record import RESULTS, Parser, parse, show_spread, show_table, spread, write_record
from benchmarks.shared.turns import TURN, order, ratios, until_quiet
from data.dali.pipeline import PREFETCH
from trainer.checkpoints.environment import revision
from trainer.cli.progress import progress
from trainer.errors import exit_code_of

BARS = {"resnet50": 1.15, "mobilenetv1": 1.3, "wrn-28-10": 1.2, "resnet20": 1.2}  # ours over plain
BAR_BEFORE = 0.99  # ours over what it was
CONTENDERS = {"ours": "ours", "tuned": "tuned PyTorch", "plain": "plain PyTorch"}
SINCE = {"ours": "ours", "before": "before"}
READ_AHEAD = max(PREFETCH + 1, WORKERS * AHEAD)  # batches: ours has a thread behind DALI's own queue
WARMUP = 4  # steps: the first compiles, or measures kernels; the second compiles with these
# What trainer.distributed.host_memory does for ours, by a user's means. MALLOC_MMAP_THRESHOLD_ would not do:
# glibc takes no more than 32 MB there, and activations are larger.
KEPT_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1), "MALLOC_ARENA_MAX": "1"}


def main() -> int:
    parser = Parser("peers", __doc__)
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=f"of {', '.join(BARS)}; default: all")
    parser.add_number("--turns", 6, "of each contender; 6 are every order once")
    parser.add_number(
        "--steps", TURN * READ_AHEAD, f"in a turn; best {TURN} times what is read ahead or more"
    )
    parser.add_number("--images", 512, "JPEG files to train on")
    help = "a checkout of an earlier commit, whose trainer is the only other contender"
    parser.add_argument("--before", type=Path, metavar="FOLDER", help=help)
    options = parse(parser, "peers")
    settings: dict[str, Any] = {"steps": options.steps, "turns": options.turns}
    settings |= {"workers": WORKERS, "read_ahead": READ_AHEAD}
    if options.before:
        if not (options.before / "benchmarks" / "peers_worker.py").is_file():
            parser.error(f"--before {options.before}: there is no checkout of this project")
        settings["before"] = revision(options.before.resolve())
        options.out = RESULTS / "before.json" if options.out == RESULTS / "peers.json" else options.out
    results: dict[str, Any] = {}
    content = {"options": settings, "peers": results}
    for name in options.networks or BARS:
        for found in measure(name, options):
            results[name] = found
            write_record(options.out, content, quietly=True)
    show(results)
    write_record(options.out, content)
    return 0


class Turn(NamedTuple):
    """seconds: from a full read-ahead to a full one; refill: of these, behind the last step."""

    seconds: float
    refill: float


def measure(name: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """After each turn of all: images per second, and ratios turn by turn."""
    from benchmarks.data_pipeline import make_tree
    from benchmarks.shared.models import NETWORKS

    network = NETWORKS[name]
    batch = network.batch(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        if network.of_files:
            make_tree(folder / "images", options.images, batch)
        steps = WARMUP + options.steps * options.turns
        names, before = (SINCE, options.before.resolve()) if options.before else (CONTENDERS, None)
        contenders = {who: _Contender(who, name, folder, steps, before) for who in names}
        for contender in contenders.values():
            contender.turn(WARMUP)
        turns: dict[str, list[Turn]] = {who: [] for who in names}
        with progress(f"{name}, turns") as on_progress:
            for turn in range(options.turns):
                for who in order(list(names), turn):
                    turns[who].append(contenders[who].turn(options.steps))
                on_progress(turn + 1, options.turns)
                bar = BAR_BEFORE if before else BARS[name]
                yield {"batch": batch, "bar": bar, **summary(turns, batch * options.steps)}
        for contender in contenders.values():
            contender.end()


def summary(turns: Mapping[str, list[Turn]], images: int) -> dict[str, Any]:
    """images: of a turn."""
    seconds = {who: [turn.seconds for turn in those] for who, those in turns.items()}
    return {
        "images_per_second": {who: spread([images / s for s in values]) for who, values in seconds.items()},
        **{f"ours_over_{who}": ratios(seconds[who], seconds["ours"]) for who in seconds if who != "ours"},
        "refill": {who: spread([t.refill / t.seconds for t in those]) for who, those in turns.items()},
    }


def variables(who: str, given: Mapping[str, str]) -> dict[str, str]:
    """Environment of a contender: on a CPU the tuned one keeps freed memory. The others find the C library's
    default, which ours changes by itself."""
    own = {name: value for name, value in given.items() if not name.startswith("MALLOC_")}
    return own | KEPT_MEMORY if who == "tuned" and not torch.cuda.is_available() else own


class _Contender:
    """In a process of its own, which steps when told to. before: the tree whose trainer is "before"."""

    def __init__(self, who: str, network: str, folder: Path, steps: int, before: Path | None = None) -> None:
        self.who, tree, environment = who, None, variables(who, os.environ)
        if who == "before":
            who, tree, folder = "ours", before, folder / "before"
            folder.mkdir()
            (folder / "images").symlink_to("../images")
            environment["PYTHONPATH"] = str(before)
        command = [sys.executable, "-m", "benchmarks.peers_worker", who, network, str(folder), str(steps)]
        self._process = process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=tree
        )
        assert process.stdin is not None
        assert process.stdout is not None
        self._orders, self._answers = process.stdin, process.stdout

    def turn(self, steps: int) -> Turn:
        begin = time.perf_counter()
        print(steps, file=self._orders, flush=True)
        if not self._answers.readline():
            raise SystemExit(f"{self.who} ended with exit code {self._process.wait()}: see above")
        stepped = time.perf_counter()
        full = until_quiet(psutil.Process(self._process.pid))
        return Turn(full - begin, full - stepped)

    def end(self) -> None:
        self._orders.close()
        self._process.wait()
        self._answers.close()


def show(results: dict[str, Any]) -> None:
    rows = []
    for name, result in results.items():
        rates = map(show_spread, result["images_per_second"].values())
        others = [who for who in result["images_per_second"] if who != "ours"]
        over = (show_spread(result[f"ours_over_{who}"], 3) for who in others)
        rows.append((name, str(result["batch"]), *rates, *over, str(result["bar"])))
    contenders = ((CONTENDERS | SINCE)[who] for who in ("ours", *others))
    columns = ("network", "batch", *contenders, *(f"ours / {who}" for who in others), f"bar, {others[-1]}")
    show_table(columns, rows, texts=("network",), title="training, images per second")


if __name__ == "__main__":
    raise SystemExit(exit_code_of(main))
