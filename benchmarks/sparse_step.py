"""Compressed training steps on sparse kernels, against dense ones and against stock layers in a plain loop.

All three are compiled and channels_last, in the same precision, over the same images; they take turns in one
process. Ours are a trainer's own steps, with everything that a step of a run does but reading data. Masks are
uniform: every layer but the first and the last keeps the same share, at random places. Or, with --masks,
those of a run's last compression, with the recipe and data of that run.

"Whole run" is what the recipe's schedule takes of dense training's time: its epochs in sparse phases count as
the compressed step against the dense one.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.shared.models import NETWORKS, Network, Ours, Stock, one_batch, short_trainer
from benchmarks.shared.record import Parser, parse, show_spread, show_table, spread, write_record
from benchmarks.shared.turns import ratios, take_turns
from trainer.checkpoints import checkpoint
from trainer.checkpoints.state import last_masks
from trainer.cli.progress import progress
from trainer.config.load import load_config
from trainer.distributed import ranks
from trainer.errors import UserError, as_user_error, exit_code_of
from trainer.paths import user_path

WHO = ("compressed", "dense", "stock")


def main() -> int:
    parser = Parser("sparse_step", __doc__)
    parser.add_argument(
        "networks", nargs="*", metavar="NETWORK", help=f"of {', '.join(NETWORKS)}; default: all"
    )
    parser.add_numbers("--percent", float, "P", "of weights dropped", default=[90, 95])
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=("fp32", "bf16"))
    parser.add_argument(
        "--masks", type=Path, metavar="RUN", help="a run folder or a checkpoint in it, whose masks to take"
    )
    parser.add_number("--turns", 9, "of each contender")
    parser.add_number("--steps", 1, "in a turn")
    parser.add_number("--batch", None, "images in a step; default: by network and device, or the run's")
    options = parse(parser, "sparse_step")
    if options.masks and options.networks:
        parser.error("--masks: a run is a network of its own, name no other")
    device = ranks.start()
    networks = {name: NETWORKS[name] for name in options.networks or NETWORKS}
    masks, percents, results = None, options.percent, []
    if options.masks:
        run, masks = read_masks(user_path(options.masks))
        kept = torch.cat([mask.flatten() for mask in masks.values()]).float().mean().item()
        networks, percents = {run.parent.name: Network.of_run(run)}, [100 * (1 - kept)]
    for name, network in networks.items():
        for precision in options.precision:
            for percent in percents:
                torch._dynamo.reset()  # the next begins afresh
                results.append(measure(name, network, precision, percent, masks, device, options))
                show(results[-1:])
    show(results)
    write_record(options.out, {"device": str(device), "sparse_step": results})
    return 0


def read_masks(path: Path) -> tuple[Path, dict[str, Tensor]]:
    """The run folder, and keep-masks by layer name of its last compression. Raises UserError."""
    found = checkpoint.newest_whole(path / "checkpoints") or path
    with as_user_error("masks"):
        masks = last_masks(checkpoint.read(found, checkpoint.STATE))
    if not masks:
        raise UserError(f"masks: {found} comes before the first compression")
    return found.resolve().parent.parent, masks


def measure(
    name: str,
    network: Network,
    precision: str,
    percent: float,
    masks: Mapping[str, Tensor] | None,
    device: torch.device,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Milliseconds of a step of each, their ratios turn by turn, and how many layers run kernels. masks: to
    train with, else uniform ones that drop `percent`."""
    count, batch = options.steps * (options.turns + 2), options.batch or network.batch(device)
    schedule = load_config(network.recipe).sparsity.build_schedule()
    overrides = [f"engine.precision={precision}"]
    if masks is None:
        overrides += ["sparsity.pattern=uniform", f"sparsity.target={percent / 100}"]
    with short_trainer(network, device, "sparse 2", batch, count, *overrides) as trainer:
        images = one_batch(trainer)
        if masks is not None:
            trainer.acdc.actions[0] = lambda weights: {key: masks[key].to(device) for key in weights}
        ours, stock = Ours(trainer), Stock(trainer)
        trainer.acdc.before_step()
        trainer.accelerate()
        layers = trainer.acdc.kernel_layers.values()
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
    gains = ratios(seconds["dense"], seconds["compressed"])
    return {
        "network": name,
        "precision": precision,
        "percent": percent,
        "batch": batch,
        "layers": len(kernels),
        "sparse_layers": sum(kernel is not None for kernel in kernels),
        "ms_per_step": {who: spread([1000 * value for value in seconds[who]]) for who in WHO},
        "dense_to_compressed": gains,
        "stock_to_compressed": ratios(seconds["stock"], seconds["compressed"]),
        "whole_run": {
            "schedule": str(schedule),
            "epochs": schedule.num_epochs,
            "sparse_epochs": schedule.num_sparse,
            "of_dense": spread([schedule.time_share(1 / gain) for gain in gains.values()]),
        },
    }


def show(results: list[dict[str, Any]]) -> None:
    rows = []
    for result in results:
        steps = (show_spread(result["ms_per_step"][who]) for who in WHO)
        gains = (show_spread(result[f"{who}_to_compressed"], 2) for who in ("dense", "stock"))
        kernels = f"{result['sparse_layers']} of {result['layers']}"
        percent, batch = f"{result['percent']:g}", str(result["batch"])
        what = (result["network"], result["precision"], percent, batch, kernels)
        rows.append((*what, *steps, *gains, show_spread(result["whole_run"]["of_dense"], 2)))
    columns = ("network", "precision", "% dropped", "batch", "sparse layers", *(f"{who}, ms" for who in WHO))
    columns += ("dense / compressed", "stock / compressed", "whole run / dense")
    show_table(columns, rows, texts=("network", "precision"), title="training steps on sparse kernels")


if __name__ == "__main__":
    raise SystemExit(exit_code_of(main))
