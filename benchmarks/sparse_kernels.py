"""Sparse CPU kernels against dense ones, by layer shape and density, and where sparse stops winning.

Each distinct layer shape of a network runs a training step's three products (forward, input gradient, weight
gradient), over random weights of which a share is kept at random places: sparse with the fastest tile, as a
run would choose it, and dense by torch in the same precision. Counted FLOPs are those executed: in each
product 2 for a kept weight, output pixel and image. Changes of the memory format are left out.

They are set against two figures of this machine, measured before and after on as many threads: what dense
reaches (large products and 3 x 3 convolutions by torch, in the same precision), and what vectors of float32
reach that are multiplied and added in registers alone. The second is float32's in tables of bf16, too:
instructions for bf16, where the CPU has them, can do twice as much.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.shared.machine import fma_flops, peak_flops
from benchmarks.shared.models import NETWORKS, Network
from benchmarks.shared.record import Parser, parse, show_table, write_record
from sparsity import GlobalMagnitude, count_flops
from sparsity.execution import family_for
from sparsity.kernels.interface import KernelFamily
from sparsity.kernels.unstructured.family import Shape
from sparsity.layers import mask_layers
from trainer.checkpoints.environment import cpu_multiplies_bf16
from trainer.cli.progress import progress
from trainer.config.load import load_config
from trainer.distributed.host_memory import retain_freed_memory
from trainer.engine import PRECISIONS
from trainer.errors import exit_code_of

CPU = torch.device("cpu")


def main() -> int:
    parser = Parser("sparse_kernels", __doc__)
    parser.add_argument(
        "networks", nargs="*", metavar="NETWORK", help=f"of {', '.join(NETWORKS)}; default: resnet50"
    )
    parser.add_numbers("--percent", int, "P", "of weights kept", default=[5, 10, 20, 30, 50, 75])
    default = ["fp32", "bf16"] if cpu_multiplies_bf16() else ["fp32"]
    parser.add_argument("--precision", nargs="+", default=default, choices=("fp32", "bf16"))
    parser.add_number("--batch", None, "images in a step; default: by network")
    options = parse(parser, "sparse_kernels")
    if not all(0 < percent <= 100 for percent in options.percent):
        parser.error("--percent: of weights kept, 1 to 100")
    retain_freed_memory()  # as in a run
    results: dict[str, dict[str, Any]] = {}
    for name in options.networks or ["resnet50"]:
        for precision in options.precision:
            family = family_for(GlobalMagnitude(0.9), CPU, PRECISIONS[precision])
            if isinstance(family, str):
                parser.error(f"sparse kernels need {family}")
            result = measure(name, precision, family, options)
            results.setdefault(name, {})[precision] = result
            show(f"{name}, {precision}, {result['batch']} images", result)
    write_record(options.out, {"device": "cpu", "sparse_kernels": results})
    return 0


def measure(name: str, precision: str, family: KernelFamily, options: argparse.Namespace) -> dict[str, Any]:
    """Figures of each distinct shape and of all layers together, and the machine's two."""
    percents, batch = sorted(set(options.percent)), options.batch or NETWORKS[name].batch(CPU)
    shapes, whole = distinct_shapes(NETWORKS[name], family, batch), np.zeros((2, len(percents), 3))
    entries: list[dict[str, Any]] = []
    peaks = [measure_peaks(precision)]
    with progress(f"{name} {precision}, layer shapes") as on_progress:
        for done, (shape, (layers, flops)) in enumerate(shapes.items()):
            found = [family.measure(shape._replace(percent=percent)) for percent in percents]
            if not all(timing.right for each in found for timing in each.timings):
                raise SystemExit(f"{shape}: the sparse kernels' results are not the dense ones'")
            times = np.array(
                [[[timing.dense, timing.sparse] for timing in each.timings] for each in found], dtype=float
            ).transpose(2, 0, 1)
            kind = str(shape).rpartition(",")[0].replace(f" {batch} x", "")
            entry = {"layer": layers[0], "layers": len(layers), "shape": kind, "dense_flops": batch * flops}
            entries.append(entry | figures(percents, times, batch * flops))
            whole += len(layers) * times
            on_progress(done + 1, len(shapes))
    peaks.append(measure_peaks(precision))
    flops = batch * sum(len(layers) * each for layers, each in shapes.values())
    count = sum(len(layers) for layers, _ in shapes.values())
    entry = {"layer": "all", "layers": count, "shape": "all layers", "dense_flops": flops}
    return {
        "batch": batch,
        "threads": torch.get_num_threads(),
        **{key: max(each[key] for each in peaks) for key in peaks[0]},
        "shapes": [*entries, entry | figures(percents, whole, flops)],
    }


def measure_peaks(precision: str) -> dict[str, float]:
    dense, fma = peak_flops(CPU, PRECISIONS[precision]), fma_flops()
    return {"dense_gflops": dense / 1e9, "fma_fp32_gflops": fma / 1e9}


def distinct_shapes(network: Network, family: KernelFamily, batch: int) -> dict[Shape, tuple[list[str], int]]:
    """(names of its layers, dense FLOPs of one product for an image) of each shape that kernels can run."""
    config, model = load_config(network.recipe), network.model()
    side = getattr(config.data, "image_size", 32)
    masked = mask_layers(model, config.sparsity.include, config.sparsity.exclude)
    shapes: dict[Shape, tuple[list[str], int]] = {}
    for layer in count_flops(model, (3, side, side)).layers:
        if layer.name in masked:
            shape = family.shape(masked[layer.name], layer.calls, batch)
            if isinstance(shape, Shape):
                shapes.setdefault(shape, ([], layer.products))[0].append(layer.name)
    return shapes


def figures(percents: Sequence[int], times: NDArray[np.float64], flops: float) -> dict[str, Any]:
    """times: microseconds, (dense and sparse, percents, products). flops: of one product, dense. Dense times
    do not depend on the mask: their medians count."""
    dense, sparse = np.median(times[0], axis=0), times[1]
    costs = sparse.sum(1) / dense.sum()
    return {
        "dense_us": dense.tolist(),
        "dense_gflops": len(dense) * flops / dense.sum() / 1e3,
        "kept": {
            str(percent): {
                "sparse_us": sparse[index].tolist(),
                "dense_to_sparse": 1 / costs[index],
                "executed_gflops": len(dense) * flops * percent / 100 / sparse[index].sum() / 1e3,
            }
            for index, percent in enumerate(percents)
        },
        "crossover_percent": crossover(percents, costs.tolist()),
    }


def crossover(percents: Sequence[float], costs: Sequence[float]) -> float | None:
    """The percentage of kept weights from which on sparse takes as long as dense, linear between the two
    measured beside it; None where it is beyond them. costs: sparse over dense times, for rising percents."""
    for (low, below), (high, above) in pairwise(zip(percents, costs, strict=True)):
        if below < 1 <= above:
            return low + (high - low) * (1 - below) / (above - below)
    return None


def show(title: str, result: dict[str, Any]) -> None:
    rows = []
    for entry in result["shapes"]:
        percents = list(entry["kept"])
        gains = entry["kept"][percents[0]]["dense_to_sparse"] > 1
        beyond = f"over {percents[-1]}" if gains else f"under {percents[0]}"
        crosses, dense_speed = entry["crossover_percent"], f"{entry['dense_gflops']:,.0f}"
        head = (entry["shape"], str(entry["layers"]), _sum(entry["dense_us"]), dense_speed)
        crossing = beyond if crosses is None else f"{crosses:.0f}"
        for percent, kept in entry["kept"].items():
            speed = kept["executed_gflops"]
            shares = (f"{100 * speed / result[key]:.0f}" for key in ("dense_gflops", "fma_fp32_gflops"))
            gain = f"{kept['dense_to_sparse']:.2f}"
            rows.append((*head, percent, _sum(kept["sparse_us"]), gain, f"{speed:,.0f}", *shares, crossing))
            head, crossing = ("",) * 4, ""
    columns = ["shape", "layers", "dense µs", "GFLOP/s", "% kept", "sparse µs", "gain", "GFLOP/s"]
    columns += ["% dense", "% FMA", "even at"]
    show_table(
        columns, rows, texts=("shape",), title=f"sparse kernels: {title}; forward + input + weight gradient"
    )
    threads, dense, fma = (result[key] for key in ("threads", "dense_gflops", "fma_fp32_gflops"))
    print(f"on {threads} threads dense reaches {dense:,.0f} GFLOP/s, float32 vectors in registers {fma:,.0f}")


def _sum(microseconds: Sequence[float]) -> str:
    return " + ".join(f"{each:,.0f}" for each in microseconds)


if __name__ == "__main__":
    raise SystemExit(exit_code_of(main))
