"""Ours against what a user would write instead: a plain PyTorch loop, torch.nn.utils.prune, a DataLoader.

The peer: the same network uncompiled, masks of prune.global_unstructured (90 %), torch.optim.SGD,
torchvision's usual transforms in worker processes. Ours: the trainer as it is, DALI included. Each runs in a
process of its own, with data of its own, and they take turns: one waits while the other steps.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from rich.table import Table

from benchmarks.record import RESULTS, console, show_spread, spread, write_record
from trainer.progress import progress

BARS = {"resnet50": 1.15, "mobilenetv1": 1.3, "wrn-28-10": 1.2, "resnet20": 1.2}
CONTENDERS = ("ours", "peer")


def main() -> int:
    parser = argparse.ArgumentParser(prog="acdc bench peers", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=f"of {', '.join(BARS)}; default: all")
    add = partial(parser.add_argument, metavar="N", type=int)
    add("--turns", default=7, help="of each contender; default: 7")
    add("--steps", default=4, help="in a turn; default: 4")
    add("--images", default=512, help="JPEG files to train on; default: 512")
    parser.add_argument("--out", type=Path, default=RESULTS / "peers.json", metavar="FILE")
    options = parser.parse_args()
    results = {name: measure(name, options) for name in options.networks or BARS}
    show(results)
    write_record(options.out, {"options": {"steps": options.steps, "turns": options.turns}, "peers": results})
    return 0


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Images per second of both, and the ratio turn by turn."""
    from benchmarks.data_pipeline import make_tree
    from benchmarks.models import NETWORKS

    network = NETWORKS[name]
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        if network.recipe.startswith("imagenet"):
            make_tree(folder / "images", options.images)
        steps = options.steps * (options.turns + 1)
        batch = network.batch(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        if network.recipe.startswith("imagenet") and options.images < batch:
            raise SystemExit(f"--images {options.images}: a batch has {batch}")
        workers = [_Worker(who, name, folder, steps) for who in CONTENDERS]
        seconds: dict[str, list[float]] = {who: [] for who in CONTENDERS}
        with progress(f"{name}, turns") as on_progress:
            for turn in range(options.turns + 1):  # the first warms up, and compiles
                for worker in workers if turn % 2 else reversed(workers):
                    elapsed = worker.run(options.steps)
                    if turn:
                        seconds[worker.who].append(elapsed / options.steps)
                on_progress(turn, options.turns)
        for worker in workers:
            worker.end()
    rates = {who: spread([batch / value for value in values]) for who, values in seconds.items()}
    ratio = spread([b / a for a, b in zip(seconds["ours"], seconds["peer"], strict=True)])
    return {"batch": batch, "images_per_second": rates, "ours_over_peer": ratio, "bar": BARS[name]}


class _Worker:
    """A contender in a process of its own, which steps when told to."""

    def __init__(self, who: str, network: str, folder: Path, steps: int) -> None:
        self.who = who
        command = [sys.executable, "-m", "benchmarks.peers_worker", who, network, str(folder), str(steps)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, steps: int) -> float:
        """Seconds of so many steps."""
        print(steps, file=self._pipe(self._process.stdin), flush=True)
        answer = self._pipe(self._process.stdout).readline()
        if not answer:
            raise SystemExit(f"{self.who} ended with exit code {self._process.wait()}: see above")
        return float(answer.removeprefix("seconds "))

    def end(self) -> None:
        self._pipe(self._process.stdin).close()
        self._process.wait()

    def _pipe(self, pipe: IO[str] | None) -> IO[str]:
        assert pipe is not None
        return pipe


def show(results: dict[str, Any]) -> None:
    table = Table(title="training, images per second")
    for column in ("network", "batch", "ours", "plain PyTorch", "ours / plain", "bar"):
        table.add_column(column, justify="left" if column == "network" else "right")
    for name, result in results.items():
        rates = (show_spread(result["images_per_second"][who]) for who in CONTENDERS)
        ratio = show_spread(result["ours_over_peer"], 2)
        table.add_row(name, str(result["batch"]), *rates, ratio, str(result["bar"]))
    console().print(table)


if __name__ == "__main__":
    raise SystemExit(main())
