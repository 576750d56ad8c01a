"""What masks and the trainer cost: our step against the same model with stock layers in a plain PyTorch loop.

Both are compiled and channels_last, both use fused SGD and the same images; they take turns in one process.
Ours is in a compressed phase, with everything that a step of a run does but reading data.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from benchmarks.shared.models import NETWORKS, Ours, Stock, one_batch, short_trainer
from benchmarks.shared.record import Parser, parse, show_spread, show_table, spread, write_record
from benchmarks.shared.turns import ratios, take_turns
from trainer.cli.progress import progress
from trainer.distributed import ranks

DEFAULT = ("resnet50", "mobilenetv1", "wrn-28-10")


def main() -> int:
    parser = Parser("overhead", __doc__)
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=f"of {', '.join(NETWORKS)}")
    parser.add_number("--turns", 9, "of each contender")
    parser.add_number("--steps", 3, "in a turn")
    parser.add_number("--batch", None, "images in a step; default: by network and device")
    options = parse(parser, "overhead")
    device = ranks.start()
    results: dict[str, Any] = {}
    content = {"device": str(device), "overhead": results}
    for name in options.networks or DEFAULT:
        torch._dynamo.reset()  # the next network begins afresh
        results[name] = measure(name, device, options)
        write_record(options.out, content, quietly=True)
    show(results)
    write_record(options.out, content)
    return 0


def measure(name: str, device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of a step, ours and stock, and their ratio turn by turn."""
    network, count = NETWORKS[name], options.steps * (options.turns + 1)
    batch = options.batch or network.batch(device)
    with short_trainer(network, device, "sparse 2", batch, count) as trainer:
        images = one_batch(trainer)
        ours, stock = Ours(trainer), Stock(trainer.config, trainer, device)
        with progress(f"{name}, turns") as on_progress:
            seconds = take_turns(
                {"ours": lambda: ours.step(images), "stock": lambda: stock.step(images)},
                options.turns,
                options.steps,
                device,
                on_progress,
            )
    table = {who: spread([1000 * value for value in values]) for who, values in seconds.items()}
    return {"batch": batch, "ms_per_step": table, "ratio": ratios(seconds["ours"], seconds["stock"])}


def show(results: dict[str, Any]) -> None:
    rows = []
    for name, result in results.items():
        steps = (show_spread(result["ms_per_step"][who]) for who in ("ours", "stock"))
        rows.append((name, str(result["batch"]), *steps, show_spread(result["ratio"], 3)))
    columns = ("network", "batch", "ours, ms", "stock, ms", "ours / stock")
    title = "masked step against the same model with stock layers, both compiled"
    show_table(columns, rows, texts=("network",), title=title)


if __name__ == "__main__":
    raise SystemExit(main())
