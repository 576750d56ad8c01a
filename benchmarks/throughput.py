"""Training images per second: real data, noise on the device, the loader alone; dense and compressed phase.

One trainer runs all, in turns: dense and compressed, each with real data and with noise, in an order that
rotates. Real data are JPEG files, or small images in memory, through DALI. "Cost of data" is how much longer
a turn with them takes than the turn with noise beside it. On a CPU it is more than the wait for data, because
decoding takes cores from the model. A turn begins and ends with the read-ahead full (see
benchmarks.shared.turns): its N steps pay for exactly N batches, of which at most data.dali.pipeline.PREFETCH
+ 1 are made behind the last step.

FLOP/s are dense-equivalent (what the dense model would take) and executed (less what 2:4 kernels skip). The
peak beside them is measured before and after, by large products and convolutions in the same precision. "Of
memory" compares with the rate at which the bytes that a step moves at the least would go by (what counts is
told in benchmarks.shared.traffic), at the speed of a large copy in the same run. --profile adds the share of
each kind of kernel in a dense step on noise.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from benchmarks.data_pipeline import make_tree, measure_loader
from benchmarks.shared.machine import forget_peak, peak_flops, peak_gb
from benchmarks.shared.models import IN_EPOCH, NETWORKS, Network, Stock, short_run
from benchmarks.shared.phases import NOISE, Turn, cost_of_data, sources_of, take_phases
from benchmarks.shared.profile import profile_steps
from benchmarks.shared.record import (
    Parser,
    console,
    parse,
    percentile,
    settings,
    show_spread,
    show_table,
    spread,
    write_record,
)
from benchmarks.shared.traffic import Traffic, copy_bandwidth
from benchmarks.shared.turns import TURN
from data.dali.pipeline import PREFETCH, import_dali
from data.loader import Batch
from sparsity import Kernel, mask_layers
from trainer.build import build_trainer
from trainer.cli.progress import progress
from trainer.config.schema import Config
from trainer.distributed import ranks
from trainer.engine import precision
from trainer.errors import exit_code_of
from trainer.loop import Trainer


def main() -> int:
    parser = Parser("throughput", __doc__)
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=f"of {', '.join(NETWORKS)}")
    parser.add_number("--turns", 4, "with each phase and kind of data")
    steps_help = f"in a turn, 2 or more; best {TURN} times the read-ahead or more"
    parser.add_number("--steps", TURN * (PREFETCH + 1), steps_help)
    parser.add_number("--warmup", 5, "steps before, with each")
    parser.add_number("--batch", None, "images in a step; default: by network and device")
    parser.add_number("--images", 512, "JPEG files for the real data; 0: noise alone")
    parser.add_argument("--pattern", choices=["global", "2:4", "2:4 transposable"], default="global")
    parser.add_argument("--profile", action="store_true", help="the share of each kind of kernel, besides")
    options = parse(parser, "throughput")
    if options.steps < 2:
        parser.error("--steps: 2 or more, to tell p50 from p95")
    try:
        import_dali()
    except ModuleNotFoundError as error:
        print(f"real data left out: {error}")
        options.images = 0
    device = ranks.start()
    rows: list[dict[str, Any]] = []
    networks: dict[str, dict[str, Any]] = {}
    content = {"device": str(device), "options": settings(options), "throughput": rows, "networks": networks}
    for name in options.networks or ["resnet50"]:
        networks[name] = {}
        with tempfile.TemporaryDirectory() as folder:
            for found in measure(name, Path(folder), device, options, networks[name]):
                rows += found
                write_record(options.out, content, quietly=True)
    show(rows, networks)
    write_record(options.out, content)
    return 0


def measure(
    name: str, folder: Path, device: torch.device, options: argparse.Namespace, whole: dict[str, Any]
) -> Iterator[list[dict[str, Any]]]:
    """Rows, of each phase and kind of data, then none whenever `whole` has more: what belongs to the network
    as a whole."""
    torch._dynamo.reset()
    forget_peak(device, free=True)  # what the network before took
    with closing(build_trainer(_config(NETWORKS[name], folder, device, options), device)) as trainer:
        dtype = precision(trainer.config, device)
        peak = peak_flops(device, dtype)
        whole["copy_bandwidth"] = copy_bandwidth(device)
        try:
            whole["bytes_per_image"] = bytes_per_image(trainer)
        except Exception as error:  # images per second are worth more
            whole["bytes_error"] = f"{type(error).__name__}: {error}"
        sources = sources_of(trainer, real=options.images > 0)
        with progress(f"{name}, turns") as on_progress:
            counts = options.turns, options.steps, options.warmup
            turns = take_phases(trainer, sources, *counts, on_progress)
        whole["peak_memory_gb"] = peak_gb(device)
        whole["measured_peak_flops"] = peak = max(peak, peak_flops(device, dtype))
        for batches in (sources[kind] for kind in sources if kind != NOISE):
            alone = [measure_loader(batches, options.steps)[0] for _ in range(options.turns)]
            whole["loader_alone"] = spread([_num_images(trainer, options.steps) / wall for wall in alone])
        rows = []
        for (phase, kind), those in turns.items():
            batch = trainer.config.data.batch_size
            row: dict[str, Any] = {"network": name, "phase": phase, "data": kind, "batch": batch}
            row |= _figures(trainer, phase, those, peak)
            if "bytes_per_image" in whole:
                speed = row["images_per_second"]["median"] * sum(whole["bytes_per_image"].values())
                row["of_memory_roofline"] = speed / whole["copy_bandwidth"]
            if kind != NOISE:
                row["cost_of_data"] = cost_of_data(those, turns[phase, NOISE])
            rows.append(row)
        yield rows
        if options.profile:
            trainer.acdc.decompress()
            batches = sources[NOISE]
            whole["profile"] = profile_steps(lambda: trainer.train_batch(batches), 3, device)
            yield []


def bytes_per_image(trainer: Trainer) -> dict[str, float]:
    """That a step moves at the least, by kind of operator, at the run's batch size: from uncompiled steps of
    two sizes, since all but the weights' bytes grow with the batch."""
    stock, counted = Stock(trainer, compiled=False), []
    mask_layers(stock.module.model, exclude=trainer.config.sparsity.exclude)
    images, labels = next(sources_of(trainer, real=False)[NOISE])
    few = min(2, len(labels))
    for size in (few, 2 * few):
        repeated = torch.cat([images[:few]] * (size // few)), torch.cat([labels[:few]] * (size // few))
        with Traffic() as traffic:
            stock.step(Batch(repeated[0].contiguous(memory_format=torch.channels_last), repeated[1]))
        counted.append(traffic.bytes)
    once, twice = counted
    batch = trainer.config.data.batch_size
    return {kind: (twice[kind] - once[kind]) / few + (2 * once[kind] - twice[kind]) / batch for kind in once}


def _config(network: Network, folder: Path, device: torch.device, options: argparse.Namespace) -> Config:
    batch, in_epoch = options.batch or network.batch(device), IN_EPOCH
    overrides: list[str] = []
    if options.images and network.of_files:
        root = make_tree(folder / "images", options.images, batch)
        in_epoch = options.images // batch
        overrides += [f"data.root={root}", "data.backend=dali"]
    if options.pattern != "global":
        overrides += [f"sparsity.pattern={options.pattern}", "sparsity.target=null"]
    return short_run(network, folder, "sparse 2", batch, in_epoch, *overrides)


def _figures(trainer: Trainer, phase: str, turns: list[Turn], peak: float) -> dict[str, Any]:
    rates = spread([_num_images(trainer, len(turn.steps)) / turn.seconds for turn in turns])
    steps = [seconds for turn in turns for seconds in turn.steps]
    dense = trainer.flops.at(0).training()
    kernels = trainer.acdc.kernels if phase == "compressed" else {}
    return {
        "images_per_second": rates,
        "step_p50": percentile(steps, 50),
        "step_p95": percentile(steps, 95),
        "data_wait": spread([turn.waited / turn.seconds for turn in turns]),
        "refill": spread([turn.refill / turn.seconds for turn in turns]),
        "dense_equivalent_flops": rates["median"] * dense,
        "executed_flops": rates["median"] * (dense - _skipped(trainer, kernels)),
        "utilisation": rates["median"] * dense / peak,
        "layers_on_kernels": len(kernels),
    }


def _num_images(trainer: Trainer, steps: int) -> int:
    return steps * trainer.config.data.batch_size


def _skipped(trainer: Trainer, kernels: Mapping[str, Kernel]) -> float:
    """FLOPs of an image that kernels leave out."""
    products = {layer.name: layer.products for layer in trainer.flops.at(0).layers}
    trainer.acdc.compress(trainer.acdc.pattern)  # the last turn may have been dense
    dropped = {name: 1 - mask.float().mean().item() for name, mask in trainer.acdc.masks().items()}
    counted = ((dropped.get(name, 0) * products[name], kernel) for name, kernel in kernels.items())
    return sum(flops * kernel.sparse_products for flops, kernel in counted)


def show(measured: list[dict[str, Any]], networks: dict[str, dict[str, Any]]) -> None:
    rows, texts = [], ("network", "phase", "data")
    for row in measured:
        wait, cost = (
            show_spread(row[name], 2, times=100) if name in row else "-"
            for name in ("data_wait", "cost_of_data")
        )
        steps = (f"{1000 * row[name]:,.1f}" for name in ("step_p50", "step_p95"))
        flops = (
            f"{row['dense_equivalent_flops'] / 1e12:.3f}",
            f"{100 * row['utilisation']:.0f} %",
            f"{100 * row.get('of_memory_roofline', math.nan):.0f} %",
        )
        named = (row[name] for name in texts)
        rows.append((*named, show_spread(row["images_per_second"]), *steps, wait, cost, *flops))
    columns = ["images/s", "p50 ms", "p95 ms", "data wait, %", "cost of data, %"]
    columns += ["TFLOP/s", "of peak", "of memory"]
    show_table((*texts, *columns), rows, texts, title="training throughput")
    screen = console()
    for name, whole in networks.items():
        screen.print(f"{name}: at most {whole['peak_memory_gb']:.1f} GB of memory")
        if "loader_alone" in whole:
            screen.print(f"{name}, loader alone: {show_spread(whole['loader_alone'], 0)} images/s")
        if "bytes_per_image" in whole:
            moved, speed = sum(whole["bytes_per_image"].values()) / 1e6, whole["copy_bandwidth"] / 1e9
            screen.print(f"{name}: {moved:,.0f} MB an image at the least, copied at {speed:,.0f} GB/s")
        if "profile" in whole:
            shares = ", ".join(f"{kind} {share:.0%}" for kind, share in whole["profile"]["shares"].items())
            screen.print(f"{name}, a dense step: {shares}")


if __name__ == "__main__":
    raise SystemExit(exit_code_of(main))
