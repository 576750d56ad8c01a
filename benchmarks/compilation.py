"""What compiling costs and brings: not at all, block by block, or the whole model as one graph.

Every way runs in a process of its own with an empty cache, then once more with what the first left there. The
model is masked; a step is forward, backward and SGD on noise.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.shared.models import NETWORKS
from benchmarks.shared.record import Parser, parse, show_spread, show_table, spread, write_record
from benchmarks.shared.turns import repeat_ways, run_apart
from data.synthetic import SyntheticLoader
from trainer.errors import exit_code_of

WAYS = ("uncompiled", "blocks", "whole")


def main() -> int:
    parser, names = Parser("compilation", __doc__), ", ".join(NETWORKS)
    parser.add_argument("networks", nargs="*", default=["resnet50"], metavar="NETWORK", help=names)
    parser.add_number("--repeats", 3, "of each way, in turns")
    parser.add_number("--steps", 5, "timed, behind the first")
    options = parse(parser, "compilation")
    results: dict[str, dict[str, Any]] = {}
    for network in options.networks:
        run = partial(_in_processes, network, steps=options.steps)
        for found in repeat_ways(network, WAYS, options.repeats, run, _cold_and_warm):
            results[network] = found
            write_record(options.out, {"compilation": results}, quietly=True)
    show(results)
    write_record(options.out, {"compilation": results})
    return 0


def _cold_and_warm(runs: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """With an empty cache (cold), and with what that left (warm)."""
    cold, warm = zip(*runs, strict=True)
    return {"cold": summary(cold), "warm": summary(warm)}


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of what `measure` gave: spread of first and of later steps, number of graphs."""
    return {
        "first": spread([run["first"] for run in runs]),
        "step": spread([seconds for run in runs for seconds in run["steps"]]),
        "graphs": max(run["graphs"] for run in runs),
    }


def _in_processes(network: str, way: str, steps: int) -> list[dict[str, Any]]:
    """Measured with an empty cache, and with what that left."""
    with tempfile.TemporaryDirectory() as cache:
        return [run_apart(measure, network, way, steps, TORCHINDUCTOR_CACHE_DIR=cache) for _ in range(2)]


def measure(name: str, way: str, steps: int) -> dict[str, Any]:
    """Seconds of the first step and of later ones, and the number of graphs."""
    from sparsity import mask_layers
    from trainer.config.load import load_config
    from trainer.distributed import ranks
    from trainer.engine import precision
    from trainer.models.classifier import Classifier

    device = ranks.start()
    network = NETWORKS[name]
    torch.manual_seed(0)
    model = network.model()
    mask_layers(model)
    classifier: Any = Classifier(model, (0.5,) * 3, (0.5,) * 3).to(device)
    classifier.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(classifier.parameters(), 0.01, 0.9, fused=True)
    batch, side = network.batch(device), network.image_shape[1]
    noise = next(SyntheticLoader(batch, 1, batch, lambda _: side, network.num_classes, device).epoch(0))
    _compile(classifier, way)
    dtype = precision(load_config(network.recipe), device)
    seconds = []
    for _ in range(steps + 1):
        begin = time.perf_counter()
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss, _ = classifier(*noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # wait for the device
        seconds.append(time.perf_counter() - begin)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return {"first": seconds[0], "steps": seconds[1:], "graphs": int(graphs)}


def _compile(classifier: nn.Module, way: str) -> None:
    if way == "whole":
        classifier.compile(dynamic=False)
    if way == "blocks":
        torch._dynamo.config.recompile_limit = 64  # a graph for each of a block's shapes
        for block in _blocks(classifier):
            block.compile(dynamic=False)


def _blocks(module: nn.Module) -> list[nn.Module]:
    """The repeated modules of the outermost stacks: residual blocks, separable convolutions."""
    stacks = [part for part in module.modules() if isinstance(part, nn.Sequential) and len(part) > 1]
    inner = {id(deep) for stack in stacks for part in stack for deep in part.modules() if deep is not part}
    return [
        part for stack in stacks if id(stack) not in inner for part in stack if len(list(part.children()))
    ]


def show(results: dict[str, dict[str, Any]]) -> None:
    rows = []
    for network, ways in results.items():
        for way, of in ways.items():
            figures = (of["cold"]["first"], of["warm"]["first"], of["cold"]["step"])
            seconds = (show_spread(figure, 2) for figure in figures)
            rows.append((network, way, *seconds, str(of["cold"]["graphs"])))
    columns = ("network", "way", "first step, s", "with a cache, s", "step, s", "graphs")
    show_table(columns, rows, texts=("network", "way"), title="compiling")


if __name__ == "__main__":
    raise SystemExit(exit_code_of(main))
