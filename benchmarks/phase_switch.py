"""What a phase switch costs: compress, decompress, and recompilations over eight phases.

Times are of the whole action on the live trainer: finding the threshold, masks, weights, momentum. Beside
them stands the time that a copy of the same bytes takes: the physical limit of anything that reads and writes
all weights once. The second table counts graphs; 2:4 kernels are switched on and off as if they had won
everywhere (on a CPU their reference runs).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.shared.machine import timed
from benchmarks.shared.models import NETWORKS, Ours, one_batch, short_trainer
from benchmarks.shared.record import Parser, console, parse, show_spread, show_table, spread, write_record
from sparsity import Run24
from sparsity.kernels.semi_structured.operator import reason_unsupported
from trainer.cli.progress import progress
from trainer.distributed import ranks
from trainer.engine import num_graphs
from trainer.errors import exit_code_of
from trainer.evaluate import evaluate

PATTERNS = {
    "global 90 %": [],
    "uniform 90 %": ["sparsity.pattern=uniform"],
    "2:4": ["sparsity.pattern=2:4", "sparsity.target=null"],
    "2:4 transposable": ["sparsity.pattern=2:4 transposable", "sparsity.target=null"],
}
PHASES = "(dense 1, sparse 1) x4"


def main() -> int:
    parser = Parser("phase_switch", __doc__)
    parser.add_argument("network", nargs="?", default="resnet50", choices=NETWORKS, metavar="NETWORK")
    parser.add_number("--repeats", 9, "of each action")
    parser.add_argument("--no-graphs", action="store_true", help="leave the counting of graphs out")
    options = parse(parser, "phase_switch")
    device = ranks.start()
    times: dict[str, Any] = {}
    graphs: dict[str, list[int]] = {}
    record = {"network": options.network, "device": str(device), "seconds": times, "graphs": graphs}
    for name in PATTERNS:
        times[name] = measure(options.network, name, options.repeats, device)
        write_record(options.out, record, quietly=True)
    for name, counted in () if options.no_graphs else count_graphs(device):
        graphs[name] = counted
        write_record(options.out, record, quietly=True)
    show(times, graphs)
    write_record(options.out, record)
    return 0


def measure(network: str, pattern: str, repeats: int, device: torch.device) -> dict[str, Any]:
    """Seconds of compressing and decompressing, and of a copy of all weights."""
    overrides = ["engine.compile=false", *PATTERNS[pattern]]
    with short_trainer(NETWORKS[network], device, "dense 1, sparse 1", 8, 2, *overrides) as trainer:
        acdc = trainer.acdc
        Ours(trainer).step(one_batch(trainer))  # momentum exists from now on
        weights = list(acdc.weights().values())
        trained = [weight.clone() for weight in weights]
        actions: dict[str, Callable[[], Any]] = {
            "compress": lambda: acdc.compress(acdc.pattern),
            "decompress": acdc.decompress,
            "copy": lambda: [weight.clone() for weight in weights],
        }
        seconds: dict[str, list[float]] = {name: [] for name in actions}
        for repeat in range(repeats + 1):  # the first warms up
            # as a dense phase leaves them: of the last compression's zeros none is left
            torch._foreach_copy_(weights, trained)
            for name, action in actions.items():
                elapsed = timed(action, device)
                if repeat:
                    seconds[name].append(elapsed)
    num_weights = sum(weight.numel() for weight in weights)
    return {"num_weights": num_weights, **{name: spread(values) for name, values in seconds.items()}}


def count_graphs(device: torch.device) -> Iterator[tuple[str, list[int]]]:
    """(kernels, graphs compiled by the end of each of eight phases, an evaluation in each)."""
    for name, pattern in (("masked", "global 90 %"), ("2:4 on and off", "2:4 transposable")):
        torch._dynamo.reset()
        overrides = ["model.arguments={width: 0.25}", "data.image_size=64", *PATTERNS[pattern]]
        with (
            short_trainer(NETWORKS["mobilenetv1"], device, PHASES, 8, 3, *overrides) as trainer,
            progress(f"{name}, phases") as on_progress,
        ):
            counted = _train_phases(trainer, name != "masked", device, on_progress)
        yield name, counted


def _train_phases(trainer: Any, use24: bool, device: torch.device, on_progress: Any) -> list[int]:
    ours, batch, before, graphs = Ours(trainer), one_batch(trainer), num_graphs(), []
    if use24:
        layers = trainer.acdc.layers
        fit = [name for name, layer in layers.items() if reason_unsupported(layer, 8) is None]
        trainer.acdc.accelerate(dict.fromkeys(fit, Run24.TRANSPOSED))
    for epoch in range(trainer.config.epochs):
        for _ in range(trainer.steps_per_epoch):
            ours.step(batch)
        evaluate(trainer.engine, trainer.loaders.test, device, epoch)
        graphs.append(num_graphs() - before)
        on_progress(epoch + 1, trainer.config.epochs)
    return graphs


def show(times: dict[str, Any], graphs: dict[str, list[int]]) -> None:
    rows = []
    for pattern, result in times.items():
        actions = ("compress", "decompress", "copy")
        shown = [show_spread(result[action], times=1000) for action in actions]
        rows.append((pattern, f"{result['num_weights']:,}", *shown))
    columns = ("pattern", "weights", "compress", "decompress", "copy of the weights")
    show_table(columns, rows, texts=("pattern",), title="a phase switch, milliseconds")
    for name, counts in graphs.items():
        console().print(f"graphs by the end of each phase, {name}: {counts}", highlight=False)


if __name__ == "__main__":
    raise SystemExit(exit_code_of(main))
