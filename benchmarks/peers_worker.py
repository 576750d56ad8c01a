"""One contender of benchmarks.peers: python -m benchmarks.peers_worker ours|tuned|plain NETWORK FOLDER STEPS

Reads a number of steps from a line of standard input, trains so many, and answers "done"; STEPS in all.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers_loops import loop
from benchmarks.shared.models import IN_EPOCH, NETWORKS, Network, Ours, short_run
from benchmarks.shared.turns import endless


def main() -> int:
    who, name, folder, steps = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    with contextlib.redirect_stdout(sys.stderr):  # what libraries print is not an answer
        step = make(who, NETWORKS[name], Path(folder), int(steps))
        for line in sys.stdin:
            for _ in range(int(line)):
                step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            print("done", file=answers, flush=True)
    return 0


def make(who: str, network: Network, folder: Path, steps: int) -> Callable[[], Any]:
    """The contender's step, over data of its own."""
    if who == "ours":
        return ours(network, folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(len(os.sched_getaffinity(0)))  # as ours, whatever OMP_NUM_THREADS says
    return loop(who, network, folder, steps, device)


def ours(network: Network, folder: Path) -> Callable[[], Any]:
    """The trainer's step, in a compressed phase."""
    from trainer.build import build_trainer
    from trainer.distributed import ranks

    device = ranks.start()
    batch = network.batch(device)
    if network.of_files:
        files = len(list((folder / "images" / "train").glob("*/*.JPEG")))
        in_epoch = files // batch
        overrides = [f"data.root={folder / 'images'}", "data.backend=dali"]
    else:
        in_epoch, overrides = IN_EPOCH, []
    config = short_run(network, folder / "ours", "sparse 2", batch, in_epoch, *overrides)
    trainer = build_trainer(config, device)
    batches, contender = endless(trainer.loaders.train), Ours(trainer)
    contender.steps(batches)
    trainer.accelerate()  # as the training loop does where a compressed phase begins
    return lambda: contender.steps(batches)


if __name__ == "__main__":
    raise SystemExit(main())
