"""What a setting gains a training step: batch size, cuDNN's search, ZeRO-1, options of Inductor.

Each variant changes what its name says against `as_is`, the recipe's own step, on one batch of noise that
stays. A+B has the changes of both. Nothing waits for the device but the end of a measurement. A variant that
fails leaves its error in the record, and the next one goes on; the record is written again after each.

The options of Inductor change which kernels run, not what is computed: tests/benchmarks/test_variants.py
holds compiled gradients of each against uncompiled ones on a CPU. The losses in the record show it on a GPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.shared.machine import Stopwatch, forget_peak, peak_gb, wait_for
from benchmarks.shared.models import NETWORKS, Network, Ours, one_batch, short_trainer
from benchmarks.shared.record import Parser, parse, percentile, settings, show_table, write_record
from trainer.distributed import ranks
from trainer.engine import num_graphs
from trainer.errors import exit_code_of
from trainer.evaluate import Metrics

STEPS_IN_EPOCH = 1000  # more than any variant takes: no phase ends within


@dataclass(frozen=True)
class Variant:
    """batch: images of a step, or None for the network's own. overrides: of the recipe. inductor: options in
    torch._inductor.config."""

    batch: int | None = None
    overrides: tuple[str, ...] = ()
    schedule: str = "dense 2"
    inductor: Mapping[str, Any] = field(default_factory=dict)

    def __add__(self, other: Variant) -> Variant:
        return Variant(
            other.batch or self.batch,
            (*self.overrides, *other.overrides),
            other.schedule if self.schedule == "dense 2" else self.schedule,
            {**self.inductor, **other.inductor},
        )


_SEARCH = {"max_autotune": True, "max_autotune_gemm_backends": "ATEN,TRITON"}
# By what a figure of it is worth: a budget that ends early leaves out the last
VARIANTS = {
    "as_is": Variant(),
    "cudnn_heuristics": Variant(overrides=("engine.cudnn_benchmark=false",)),
    "compressed": Variant(schedule="sparse 2"),
    "fast_stem": Variant(overrides=("engine.fast_stem=true",)),
    "eager": Variant(overrides=("engine.compile=false",)),
    "conv_1x1_as_mm": Variant(inductor={"conv_1x1_as_mm": True}),
    "cudagraphs": Variant(inductor={"triton.cudagraphs": True}),
    "batch_512": Variant(batch=512),
    "batch_128": Variant(batch=128),
    "combo_kernels": Variant(inductor={"combo_kernels": True}),
    "coordinate_descent": Variant(inductor={"coordinate_descent_tuning": True}),
    "max_autotune_gemm": Variant(inductor=_SEARCH),
    "max_autotune": Variant(inductor={"max_autotune": True, "coordinate_descent_tuning": True}),
    "zero1": Variant(overrides=("engine.zero_stage=1",)),
}


def main() -> int:
    parser = Parser("variants", __doc__)
    parser.add_argument("network", nargs="?", default="resnet50", choices=NETWORKS, metavar="NETWORK")
    names = f"of {', '.join(VARIANTS)}, or A+B; default: all"
    parser.add_argument("--only", nargs="+", default=list(VARIANTS), type=_known, metavar="NAME", help=names)
    parser.add_number("--batch", None, "images in a step; default: by network and device")
    parser.add_number("--steps", 25, "measured, 2 or more")
    parser.add_number("--warmup", 5, "steps before, of which the first compiles")
    parser.add_number("--seconds", None, "for all; what is not begun by then is left out")
    options = parse(parser, "variants")
    if options.steps < 2:
        parser.error("--steps: 2 or more, to tell p50 from p95")
    device, network = ranks.start(), NETWORKS[options.network]
    end = time.monotonic() + (options.seconds or 10**6)
    measured: dict[str, dict[str, Any]] = {}
    for name in options.only:
        left = end - time.monotonic()
        if left < 1:
            measured[name] = {"error": "left out: the time for all is over"}
        else:
            measured[name] = attempt(network, variant_of(name), device, options, left)
        print(f"{name}: {json.dumps(measured[name])}", flush=True)
        content = {"network": options.network, "device": str(device), "options": settings(options)}
        write_record(options.out, {**content, "variants": measured}, quietly=name != options.only[-1])
    show(measured)
    return 0


def variant_of(name: str) -> Variant:
    """Raises KeyError for a name, or a part of A+B, that is not among VARIANTS."""
    first, *others = (VARIANTS[part] for part in name.split("+"))
    for other in others:
        first += other
    return first


def _known(name: str) -> str:
    try:
        variant_of(name)
    except KeyError as error:
        raise argparse.ArgumentTypeError(f"no variant {error}; there are {', '.join(VARIANTS)}") from error
    return name


def attempt(
    network: Network, variant: Variant, device: torch.device, options: argparse.Namespace, seconds: float
) -> dict[str, Any]:
    """Its figures, or its error; nothing of it stays behind."""
    torch._dynamo.reset()
    forget_peak(device, free=True)
    begin = time.monotonic()
    try:
        with _time_limit(seconds), torch._inductor.config.patch(dict(variant.inductor)):
            found = measure(network, variant, device, options)
    except Exception as error:  # the next variant counts as well
        found = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return {**found, "whole_seconds": time.monotonic() - begin}


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError within the block once they are over; between two lines of Python, no earlier."""

    def stop(number: int, frame: Any) -> None:
        raise TimeoutError("the time for all is over")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def measure(
    network: Network, variant: Variant, device: torch.device, options: argparse.Namespace
) -> dict[str, Any]:
    """first_seconds: of the first step, which compiles. losses: of the first step and of the last one."""
    batch = variant.batch or options.batch or network.batch(device)
    graphs = num_graphs()
    with short_trainer(
        network, device, variant.schedule, batch, STEPS_IN_EPOCH, *variant.overrides
    ) as trainer:
        ours, images = Ours(trainer), one_batch(trainer)
        begin = time.perf_counter()
        first = ours.step(images).clone()
        wait_for(device)
        first_seconds = time.perf_counter() - begin
        for _ in range(options.warmup - 1):
            ours.step(images)
        wait_for(device)
        watch = Stopwatch(device)
        watch.mark()
        begin = time.perf_counter()
        for _ in range(options.steps):
            last = ours.step(images)
            watch.mark()
        laps = watch.laps()
        rate = batch * options.steps / (time.perf_counter() - begin)
        return {
            "batch": batch,
            "images_per_second": rate,
            "step_p50": percentile(laps, 50),
            "step_p95": percentile(laps, 95),
            "first_seconds": first_seconds,
            "peak_memory_gb": peak_gb(device),
            "dense_equivalent_flops": rate * trainer.flops.at(0).training(),
            "graphs": num_graphs() - graphs,
            "losses": [Metrics.of(first).loss, Metrics.of(last).loss],
        }


def show(measured: dict[str, dict[str, Any]]) -> None:
    rows = []
    base = measured.get("as_is", {}).get("images_per_second")
    for name, found in measured.items():
        if "error" in found:
            rows.append((name, *["-"] * 7, found["error"][:60]))
            continue
        rate = found["images_per_second"]
        times = (f"{1000 * found[key]:,.1f}" for key in ("step_p50", "step_p95"))
        gain = "-" if base is None else f"{rate / base:.3f}"
        others = (f"{found['first_seconds']:.1f}", f"{found['peak_memory_gb']:.1f}")
        losses = " to ".join(f"{loss:.4f}" for loss in found["losses"])
        rows.append((name, str(found["batch"]), f"{rate:,.1f}", gain, *times, *others, losses))
    columns = ("batch", "images/s", "of as_is", "p50 ms", "p95 ms", "first step, s", "peak GB", "loss")
    texts = ("variant", "loss")
    show_table(("variant", *columns), rows, texts, title="variants of a training step, noise")


if __name__ == "__main__":
    raise SystemExit(exit_code_of(main))
