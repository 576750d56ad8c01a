"""What masks and the trainer cost: our step against the same model with stock layers in a plain PyTorch loop.

Both are compiled and channels_last, both use fused SGD and the same images; they take turns in one process.
Ours is in a compressed phase, with everything that a step of a run does but reading data.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from benchmarks.models import NETWORKS, Ours, Stock, one_batch, short_run
from benchmarks.record import console, parse, show_spread, spread, write_record
from benchmarks.turns import ratios, take_turns
from trainer.build import build_trainer
from trainer.cli.progress import progress
from trainer.distributed import ranks

DEFAULT = ("resnet50", "mobilenetv1", "wrn-28-10")


def main() -> int:
    parser = argparse.ArgumentParser(prog="acdc bench overhead", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=f"of {', '.join(NETWORKS)}")
    add = partial(parser.add_argument, metavar="N", type=int)
    add("--turns", default=9, help="of each contender; default: 9")
    add("--steps", default=3, help="in a turn; default: 3")
    add("--batch", help="images in a step; default: by network and device")
    options = parse(parser, "overhead")
    device = ranks.start()
    results = {}
    for name in options.networks or DEFAULT:
        torch._dynamo.reset()  # the next network begins afresh
        results[name] = measure(name, device, options)
    show(results)
    write_record(options.out, {"device": str(device), "overhead": results})
    return 0


def measure(name: str, device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of a step, ours and stock, and their ratio turn by turn."""
    network, count = NETWORKS[name], options.steps * (options.turns + 1)
    batch = options.batch or network.batch(device)
    with tempfile.TemporaryDirectory() as folder:
        config = short_run(network, Path(folder), "sparse 2", batch, count)
        trainer = build_trainer(config, device)
        try:
            images = one_batch(trainer)
            ours, stock = Ours(trainer), Stock(config, trainer, device)
            with progress(f"{name}, turns") as on_progress:
                seconds = take_turns(
                    {"ours": lambda: ours.step(images), "stock": lambda: stock.step(images)},
                    options.turns,
                    options.steps,
                    device,
                    lambda turn: on_progress(turn, options.turns),
                )
        finally:
            trainer.close()
    table = {who: spread([1000 * value for value in values]) for who, values in seconds.items()}
    return {"batch": batch, "ms_per_step": table, "ratio": ratios(seconds["ours"], seconds["stock"])}


def show(results: dict[str, Any]) -> None:
    table = Table(title="masked step against the same model with stock layers, both compiled")
    for column in ("network", "batch", "ours, ms", "stock, ms", "ours / stock"):
        table.add_column(column, justify="left" if column == "network" else "right")
    for name, result in results.items():
        steps = (show_spread(result["ms_per_step"][who]) for who in ("ours", "stock"))
        table.add_row(name, str(result["batch"]), *steps, show_spread(result["ratio"], 3))
    console().print(table)


if __name__ == "__main__":
    raise SystemExit(main())
