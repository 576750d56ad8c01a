"""What masks and the trainer cost: our step against the same model with stock layers in a plain PyTorch loop.

Both are compiled and channels_last, both use fused SGD and the same images; they take turns in one process.
Ours is in a compressed phase, with everything that a step of a run does but reading data.

--logging: what records cost instead. The run's own loop takes turns with itself: epochs with all that a run
records by default, on screen, in metrics.jsonl and TensorBoard, and epochs that record nothing. These epochs
are short, so what the end of an epoch costs weighs more than in a run. Besides, the loop's calls that record
are timed: their share of a step is seen where turns differ by more.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.shared.models import NETWORKS, Ours, Stock, one_batch, short_trainer
from benchmarks.shared.record import RESULTS, Parser, parse, show_spread, show_table, spread, write_record
from benchmarks.shared.turns import ratios, take_turns
from trainer.cli.progress import progress
from trainer.distributed import ranks
from trainer.errors import exit_code_of

DEFAULT = ("resnet50", "mobilenetv1", "wrn-28-10")
RECORDING = "percent_of_step_recording"
EVERY = 50  # steps from record to record: log.every's default


def main() -> int:
    parser = Parser("overhead", __doc__)
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=f"of {', '.join(NETWORKS)}")
    parser.add_number("--turns", 9, "of each contender")
    parser.add_number("--steps", 3, f"in a turn; with --logging, times {EVERY}")
    parser.add_number("--batch", None, "images in a step; default: by network and device")
    parser.add_argument("--logging", action="store_true", help="what a run's records cost a step")
    options = parse(parser, "overhead")
    device = ranks.start()
    what, measured, out = "overhead", measure, options.out
    if options.logging:
        what, measured = "logging", measure_logging
        options.out = out.with_name("logging.json") if out == RESULTS / "overhead.json" else out
    results: dict[str, Any] = {}
    content = {"device": str(device), what: results}
    for name in options.networks or DEFAULT:
        torch._dynamo.reset()  # the next network begins afresh
        results[name] = measured(name, device, options)
        write_record(options.out, content, quietly=True)
    show(results, *(("logged", "silent") if options.logging else ("ours", "stock")))
    write_record(options.out, content)
    return 0


def measure(name: str, device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of a step, ours and stock, and their ratio turn by turn."""
    network, count = NETWORKS[name], options.steps * (options.turns + 1)
    batch = options.batch or network.batch(device)
    with short_trainer(network, device, "sparse 2", batch, count) as trainer:
        images = one_batch(trainer)
        ours, stock = Ours(trainer), Stock(trainer)
        ways = {"ours": lambda: ours.step(images), "stock": lambda: stock.step(images)}
        with progress(f"{name}, turns") as on_progress:
            seconds = take_turns(ways, options.turns, options.steps, device, on_progress)
    table = {who: spread([1000 * value for value in values]) for who, values in seconds.items()}
    return {"batch": batch, "ms_per_step": table, "ratio": ratios(seconds["ours"], seconds["stock"])}


def measure_logging(name: str, device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of a step, logged and silent, and their ratio turn by turn. Reading data is in both."""
    network, steps = NETWORKS[name], EVERY * options.steps
    batch = options.batch or network.batch(device)
    schedule = f"sparse {2 * (options.turns + 1)}"
    overrides = (f"log.every={EVERY}st", "sparsity.accelerate=off")  # masked, as measure has it
    with short_trainer(network, device, schedule, batch, steps, *overrides) as trainer:
        monitor, numbers, recording = trainer.monitor, itertools.count(), Stopwatch()
        trainer.log_step = recording.of(trainer.log_step)  # type: ignore[method-assign]
        trainer.record_epoch = recording.of(trainer.record_epoch)  # type: ignore[method-assign]
        of_epochs: list[float] = []  # seconds in these calls

        def epoch(logged: bool) -> None:
            trainer.monitor, trainer.log_steps = (monitor, EVERY) if logged else (None, steps + 1)
            number = next(numbers)
            trainer.position.step, trainer.position.totals = 0, [0.0] * 4
            recording.seconds = 0.0
            trained = trainer.train_epoch(number)
            if logged:
                trainer.record_epoch(number, trained, trained, {})
                of_epochs.append(recording.seconds)

        ways = {"logged": lambda: epoch(True), "silent": lambda: epoch(False)}
        try:
            seconds = take_turns(ways, options.turns, 1, device)
        finally:
            trainer.monitor = monitor  # which closes its files
    table = {way: spread([1000 * value / steps for value in values]) for way, values in seconds.items()}
    recorded = statistics.median(of_epochs[1:]) / steps  # the first draws and imports what others find
    return {
        "batch": batch,
        "steps": steps,
        "ms_per_step": table,
        RECORDING: round(1e5 * recorded / table["silent"]["median"], 3),
        "ms_recording_in_first_epoch": round(1000 * of_epochs[0], 1),
        "ratio": ratios(seconds["logged"], seconds["silent"]),
    }


class Stopwatch:
    """Seconds in calls."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def of(self, call: Callable[..., None]) -> Callable[..., None]:
        def timed(*arguments: Any) -> None:
            began = time.perf_counter()
            call(*arguments)
            self.seconds += time.perf_counter() - began

        return timed


def show(results: dict[str, Any], ours: str, theirs: str) -> None:
    rows = []
    for name, result in results.items():
        steps = (show_spread(result["ms_per_step"][who]) for who in (ours, theirs))
        recording = [f"{result[RECORDING]:.3f}"] if RECORDING in result else []
        rows.append((name, str(result["batch"]), *steps, show_spread(result["ratio"], 3), *recording))
    columns = ["network", "batch", f"{ours}, ms", f"{theirs}, ms", f"{ours} / {theirs}"]
    title = "masked step against the same model with stock layers, both compiled"
    if ours == "logged":
        columns.append("recording, % of a step")
        title = "a step with what runs record by default, against one without"
    show_table(columns, rows, texts=("network",), title=title)


if __name__ == "__main__":
    raise SystemExit(exit_code_of(main))
