"""Compressed training steps on sparse kernels, against dense ones and against stock layers in a plain loop.

All three are compiled and channels_last, in the same precision, over the same images; they take turns in one
process. Ours are a trainer's own steps, with everything that a step of a run does but reading data. Masks are
uniform: every layer but the first and the last keeps the same share, at random places.
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

WHO = ("compressed", "dense", "stock")


def main() -> int:
    parser = Parser("sparse_step", __doc__)
    parser.add_argument(
        "networks", nargs="*", metavar="NETWORK", help=f"of {', '.join(NETWORKS)}; default: all"
    )
    parser.add_argument(
        "--percent", type=float, nargs="+", default=[90, 95], metavar="P", help="of weights dropped"
    )
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=("fp32", "bf16"))
    parser.add_number("--turns", 9, "of each contender")
    parser.add_number("--steps", 1, "in a turn")
    parser.add_number("--batch", None, "images in a step; default: by network and device")
    options = parse(parser, "sparse_step")
    device = ranks.start()
    results = []
    for name in options.networks or NETWORKS:
        for precision in options.precision:
            for percent in options.percent:
                torch._dynamo.reset()  # the next begins afresh
                results.append(measure(name, precision, percent, device, options))
                show(results[-1:])
    show(results)
    write_record(options.out, {"device": str(device), "sparse_step": results})
    return 0


def measure(
    name: str, precision: str, percent: float, device: torch.device, options: argparse.Namespace
) -> dict[str, Any]:
    """Milliseconds of a step of each, their ratios turn by turn, and how many layers run kernels."""
    network, count = NETWORKS[name], options.steps * (options.turns + 2)
    batch = options.batch or network.batch(device)
    overrides = [
        f"engine.precision={precision}",
        "sparsity.pattern=uniform",
        f"sparsity.target={percent / 100}",
    ]
    with short_trainer(network, device, "sparse 2", batch, count, *overrides) as trainer:
        images = one_batch(trainer)
        ours, stock = Ours(trainer), Stock(trainer.config, trainer, device)
        trainer.acdc.before_step()
        trainer.accelerate()
        layers = trainer.acdc.layers.values()
        kernels = [layer.kernel for layer in layers]

        def step(sparse: bool) -> None:
            for layer, kernel in zip(layers, kernels, strict=True):
                layer.kernel = kernel if sparse else None
            ours.step(images)

        contenders = {
            "compressed": lambda: step(True),
            "dense": lambda: step(False),
            "stock": lambda: stock.step(images),
        }
        with progress(f"{name} {precision} {percent:g} %, turns") as on_progress:
            seconds = take_turns(contenders, options.turns, options.steps, device, on_progress)
    return {
        "network": name,
        "precision": precision,
        "percent": percent,
        "batch": batch,
        "layers": len(kernels),
        "sparse_layers": sum(kernel is not None for kernel in kernels),
        "ms_per_step": {who: spread([1000 * value for value in seconds[who]]) for who in WHO},
        "dense_to_compressed": ratios(seconds["dense"], seconds["compressed"]),
        "stock_to_compressed": ratios(seconds["stock"], seconds["compressed"]),
    }


def show(results: list[dict[str, Any]]) -> None:
    rows = []
    for result in results:
        steps = (show_spread(result["ms_per_step"][who]) for who in WHO)
        gains = (show_spread(result[f"{who}_to_compressed"], 2) for who in ("dense", "stock"))
        kernels = f"{result['sparse_layers']} of {result['layers']}"
        what = (
            result["network"],
            result["precision"],
            f"{result['percent']:g}",
            str(result["batch"]),
            kernels,
        )
        rows.append((*what, *steps, *gains))
    columns = ("network", "precision", "% dropped", "batch", "sparse layers", *(f"{who}, ms" for who in WHO))
    columns += ("dense / compressed", "stock / compressed")
    show_table(columns, rows, texts=("network", "precision"), title="training steps on sparse kernels")


if __name__ == "__main__":
    raise SystemExit(main())
