"""What compiling costs and brings: not at all, block by block, or the whole model as one graph.

Every way runs in a process of its own with an empty cache, then once more with what the first left there. The
model is masked; a step is forward, backward and SGD on noise.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from rich.table import Table
from torch import nn

from benchmarks.models import NETWORKS
from benchmarks.record import console, parse, show_spread, spread, write_record
from benchmarks.turns import order
from data.loader import Batch

WAYS = ("uncompiled", "blocks", "whole")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="acdc bench compilation", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "networks", nargs="*", default=["resnet50"], metavar="NETWORK", help=", ".join(NETWORKS)
    )
    add = partial(parser.add_argument, metavar="N", type=int)
    add("--repeats", default=3, help="of each way, in turns; default: 3")
    add("--steps", default=5, help="timed, behind the first; default: 5")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)  # in a process of its own
    options = parse(parser, "compilation")
    if options.way:
        print(json.dumps(measure(options.networks[0], options.way, options.steps)))
        return 0
    results = {network: _in_turns(network, options) for network in options.networks}
    show(results)
    write_record(options.out, {"compilation": results})
    return 0


def _in_turns(network: str, options: argparse.Namespace) -> dict[str, Any]:
    """Of each way, with an empty cache (cold) and with what that left (warm)."""
    runs: dict[str, list[list[dict[str, Any]]]] = {way: [] for way in WAYS}
    for repeat in range(options.repeats):
        for way in order(WAYS, repeat):
            runs[way].append(_in_processes(network, way, options.steps))
            print(f"{network}, {way}: {repeat + 1} of {options.repeats}", flush=True)
    return {
        way: dict(zip(("cold", "warm"), map(summary, zip(*those, strict=True)), strict=True))
        for way, those in runs.items()
    }


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
        command = [
            sys.executable,
            "-m",
            "benchmarks.compilation",
            network,
            "--way",
            way,
            "--steps",
            str(steps),
        ]
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
        runs = [
            subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
            for _ in range(2)
        ]
    return [json.loads(run.stdout.splitlines()[-1]) for run in runs]


def measure(name: str, way: str, steps: int) -> dict[str, Any]:
    """Seconds of the first step and of later ones, and the number of graphs."""
    from sparsity import mask_layers
    from trainer.config.load import load_config
    from trainer.distributed import ranks
    from trainer.models import get_model
    from trainer.models.classifier import Classifier

    device = ranks.start()
    network = NETWORKS[name]
    config = load_config(network.recipe, [])
    side, classes = (224, 1000) if "imagenet" in network.recipe else (32, 100)
    torch.manual_seed(0)
    model = get_model(config.model.name, num_classes=classes, **config.model.arguments)
    mask_layers(model)
    classifier: Any = Classifier(model, (0.5,) * 3, (0.5,) * 3).to(device)
    classifier.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(classifier.parameters(), 0.01, 0.9, fused=True)
    batch = network.batch(device)
    images = torch.randint(0, 256, (batch, side, side, 3), dtype=torch.uint8, device=device).permute(
        0, 3, 1, 2
    )
    noise = Batch(images, torch.randint(0, classes, (batch,), device=device))
    _compile(classifier, way)
    seconds = []
    for _ in range(steps + 1):
        begin = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
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
    table = Table(title="compiling")
    for column in ("network", "way", "first step, s", "with a cache, s", "step, s", "graphs"):
        table.add_column(column, justify="left" if column in ("network", "way") else "right")
    for network, ways in results.items():
        for way, of in ways.items():
            figures = (of["cold"]["first"], of["warm"]["first"], of["cold"]["step"])
            seconds = (show_spread(figure, 2) for figure in figures)
            table.add_row(network, way, *seconds, str(of["cold"]["graphs"]))
    console().print(table)


if __name__ == "__main__":
    raise SystemExit(main())
