"""Training images per second: real files, noise on the device, the loader alone; dense and compressed phase.

FLOP/s are dense-equivalent (what the dense model would take) and executed (less what 2:4 kernels skip). The
peak beside them is measured here, by large products and convolutions in the same precision.
"""

from __future__ import annotations

import argparse
import itertools
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch.nn import functional

from benchmarks.data_pipeline import make_tree
from benchmarks.models import NETWORKS, Network, short_run
from benchmarks.record import RESULTS, console, write_record
from data.loader import Batch
from sparsity import Run24
from trainer import ranks
from trainer.build import build_trainer
from trainer.engine import precision
from trainer.loop import Trainer
from trainer.progress import progress

PHASES = {"dense": "dense 2", "compressed": "sparse 2"}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="acdc bench throughput", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=f"of {', '.join(NETWORKS)}")
    add = partial(parser.add_argument, metavar="N", type=int)
    add("--steps", default=20, help="measured, in each phase, 2 or more; default: 20")
    add("--warmup", default=5, help="steps before; default: 5")
    add("--batch", help="images in a step; default: by network and device")
    add("--images", default=512, help="JPEG files for the real data; 0: noise alone; default: 512")
    parser.add_argument("--pattern", choices=["global", "2:4", "2:4 transposable"], default="global")
    parser.add_argument("--out", type=Path, default=RESULTS / "throughput.json", metavar="FILE")
    options = parser.parse_args()
    if options.steps < 2:
        parser.error("--steps: 2 or more, to tell p50 from p95")
    device = ranks.start()
    results = []
    for name in options.networks or ["resnet50"]:
        with tempfile.TemporaryDirectory() as folder:
            results += measure(name, Path(folder), device, options)
    show(results)
    settings = {key: str(value) for key, value in vars(options).items() if key != "out"}
    write_record(options.out, {"device": str(device), "options": settings, "throughput": results})
    return 0


def measure(
    name: str, folder: Path, device: torch.device, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """A record of each phase and kind of data."""
    network = NETWORKS[name]
    batch = options.batch or network.batch(device)
    real = _real_data(network, folder, options.images)
    records = []
    for phase, schedule in PHASES.items():
        for kind, overrides in {"noise": [], **({} if real is None else {"files": real})}.items():
            torch._dynamo.reset()
            steps = options.warmup + options.steps
            in_epoch = steps if kind == "noise" else min(steps, options.images // batch)
            if not in_epoch:
                continue
            pattern = [] if options.pattern == "global" else [f"sparsity.pattern={options.pattern}"]
            pattern += ["sparsity.target=null"] * bool(pattern)
            config = short_run(network, folder, schedule, batch, in_epoch, *overrides, *pattern)
            trainer = build_trainer(config, device)
            try:
                label = f"{name}, {phase}, {kind}"
                record = _train(trainer, label, options)
                if kind == "files" and phase == "dense":
                    record["loader_alone"] = _loader_alone(trainer, options.steps)
            finally:
                trainer.close()
            records.append({"network": name, "phase": phase, "data": kind, "batch": batch, **record})
    return records


def _real_data(network: Network, folder: Path, num_images: int) -> list[str] | None:
    """Overrides for training on JPEG files made here, or None."""
    if not num_images or not network.recipe.startswith("imagenet"):
        return None
    try:
        from data.dali import import_dali

        import_dali()
    except ModuleNotFoundError as error:
        print(f"real data left out: {error}")
        return None
    return [f"data.root={make_tree(folder / 'images', num_images)}", "data.backend=dali"]


def _train(trainer: Trainer, label: str, options: argparse.Namespace) -> dict[str, Any]:
    """Steps of a run one by one, the device waited for behind each."""
    seconds, waits = [], []
    batches = _endless(trainer)
    with progress(f"{label}, steps") as on_progress:
        for number in range(options.warmup + options.steps):
            if number == options.warmup and trainer.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()  # without what tuning took
            begin = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - begin
            trainer.acdc.before_step()
            if trainer.acdc.phase.kind == "sparse" and number == 0:
                trainer.accelerate()
            trainer.train_batch(iter([batch]))
            _finish(trainer.device)
            if number >= options.warmup:
                seconds.append(time.perf_counter() - begin)
                waits.append(waited)
            on_progress(number + 1, options.warmup + options.steps)
    rate = trainer.config.data.batch_size * len(seconds) / sum(seconds)
    flops = trainer.flops.at(0).training()
    peak = _peak_flops(trainer)
    quantiles = statistics.quantiles(seconds, n=20)
    return {
        "images_per_second": rate,
        "step_p50": statistics.median(seconds),
        "step_p95": quantiles[-1],
        "data_wait": sum(waits) / sum(seconds),
        "peak_memory_gb": _peak_memory_gb(trainer.device),
        "dense_equivalent_flops": rate * flops,
        "executed_flops": rate * (flops - _skipped(trainer)),
        "measured_peak_flops": peak,
        "utilisation": rate * flops / peak,
        "layers_on_24": len(trainer.acdc.run24),
    }


def _endless(trainer: Trainer) -> Iterator[Batch]:
    return itertools.chain.from_iterable(trainer.loaders.train.epoch(epoch) for epoch in itertools.count())


def _skipped(trainer: Trainer) -> float:
    """FLOPs of an image that 2:4 kernels leave out: half of a forward pass, and of an input gradient."""
    layers = {layer.name: layer.flops() for layer in trainer.flops.at(0).layers}
    halves = {Run24.FORWARD: 1, Run24.TRANSPOSED: 2}
    return sum(layers[name] / 2 * halves[how] for name, how in trainer.acdc.run24.items())


def _peak_flops(trainer: Trainer, repeats: int = 10) -> float:
    """Of large matrix products and 3 x 3 convolutions, the faster: on a CPU two libraries do them."""
    device = trainer.device
    dtype, large = precision(trainer.config, device), device.type == "cuda"
    size, images = (8192, 256) if large else (1536, 32)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = 2 * size**3 / min(_timed(lambda: a @ b, device) for _ in range(repeats))
    x = torch.randn(images, 256, 28, 28, device=device).to(dtype).to(memory_format=torch.channels_last)
    kernel = torch.randn(256, 256, 3, 3, device=device).to(dtype).to(memory_format=torch.channels_last)
    convolve = partial(functional.conv2d, x, kernel, padding=1)
    flops = 2 * kernel.numel() * images * 28 * 28
    return max(product, flops / min(_timed(convolve, device) for _ in range(repeats)))


def _timed(call: Callable[[], Any], device: torch.device) -> float:
    _finish(device)
    begin = time.perf_counter()
    call()
    _finish(device)
    return time.perf_counter() - begin


def _loader_alone(trainer: Trainer, count: int) -> float:
    """Images per second of the loader while nothing else runs, beyond what was ready."""
    batches = _endless(trainer)
    for _ in range(8):
        next(batches)
    seconds = _timed(lambda: [next(batches) for _ in range(count)], trainer.device)
    return trainer.config.data.batch_size * count / seconds


def _peak_memory_gb(device: torch.device) -> float:
    """Of the device; on a CPU, of this process so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def show(results: list[dict[str, Any]]) -> None:
    table = Table(title="training throughput")
    columns = ("network", "phase", "data", "images/s", "p50 ms", "p95 ms", "wait", "GB", "TFLOP/s", "of peak")
    for column in columns:
        table.add_column(column, justify="left" if column in ("network", "phase", "data") else "right")
    for result in results:
        table.add_row(
            result["network"],
            result["phase"],
            result["data"],
            f"{result['images_per_second']:,.1f}",
            f"{1000 * result['step_p50']:,.1f}",
            f"{1000 * result['step_p95']:,.1f}",
            f"{100 * result['data_wait']:.2f} %",
            f"{result['peak_memory_gb']:.1f}",
            f"{result['dense_equivalent_flops'] / 1e12:.3f}",
            f"{100 * result['utilisation']:.0f} %",
        )
    screen = console()
    screen.print(table)
    for result in results:
        if "loader_alone" in result:
            screen.print(f"{result['network']}, loader alone: {result['loader_alone']:,.0f} images/s")


if __name__ == "__main__":
    raise SystemExit(main())
