"""What a run shows before its first step and after its last."""

from __future__ import annotations

import logging
import re
from statistics import median
from typing import Any

from torch import Tensor

from sparsity import PhaseSchedule
from sparsity.stats import shares_unpruned
from trainer.checkpoints.run_dir import DENSE_TWIN, EMA, FINETUNED_DENSE, SPARSE, RunDir
from trainer.config.schema import Config
from trainer.distributed import ranks
from trainer.engine import autocast, num_graphs, precision_name
from trainer.evaluate import Interrupted, confusion
from trainer.loop import Trainer
from trainer.monitor.drawing import phase_table
from trainer.monitor.screen import Screen, closing_lines, closing_table
from trainer.report.records import recipe_of
from trainer.report.run import write_report

_LONG = 68  # columns of a schedule's text beside the word "phases"
_MOST_CLASSES = 5000  # in a table of confused ones: 200 MB of counts

log = logging.getLogger(__name__)


def log_start(trainer: Trainer) -> None:
    """Show what is about to run, on what and where."""
    if not trainer.monitor:
        return
    config, acdc = trainer.config, trainer.acdc
    num_weights = sum(weight.numel() for weight in acdc.weights().values())
    computed = precision_name(config, trainer.device)
    if config.engine.precision == "auto":
        computed += " (engine.precision=auto)"
    masked = f"{len(acdc.layers)} masked layers with {num_weights:,} weights"
    devices = f"{ranks.world_size()} x {trainer.device.type}"
    lines = [
        f"run folder  {trainer.run_dir.path}    (acdc board {trainer.run_dir.path})",
        f"data        {trainer.loaders.describe()}",
        f"model       {config.model.name}, {masked}, {acdc.pattern}",
        *phase_lines(config),
        f"device      {devices}, {computed}, ZeRO stage {config.engine.zero_stage}",
    ]
    lines[3:3] = [f"{about:<10}  {text}" for about, text in trainer.task.notes.items()]
    if acdc.layers:
        lines[3:3] = [f"not pruned  {unpruned_line(shares_unpruned(acdc.model, acdc.layers))}"]
    if trainer.position.epoch or trainer.position.step:
        lines.append(f"begins      at epoch {trainer.position.epoch}, step {trainer.position.step} of it")
    if trainer.engine.is_compiled:
        lines.append("compiling   at the first step; up to a minute, later runs find it cached")
    for line in lines:
        trainer.monitor.screen.say(line)


def phase_lines(config: Config) -> list[str]:
    """The schedule as a recipe writes it, where that is short, and a table of its phases."""
    schedule = config.sparsity.build_schedule()
    text, count = str(schedule), len(schedule.phases)
    if len(text) > _LONG:
        text = f"{count} of them, {schedule.num_sparse} of {schedule.num_epochs} epochs sparse"
    return [f"phases      {text}", *(phase_table(config) if count > 1 else [])]


def unpruned_line(shares: dict[str, float], most: int = 4) -> str:
    """shares: as shares_unpruned gives them. Names that differ in numbers alone are put together."""
    alike: dict[str, list[str]] = {}
    for name in shares:
        alike.setdefault(re.sub(r"\d+", "*", name), []).append(name)
    groups = [
        (sum(shares[name] for name in names), f"{len(names)} x {pattern}" if names[1:] else names[0])
        for pattern, names in alike.items()
    ]
    groups.sort(reverse=True)
    told = [f"{name.removesuffix('.weight')} {_percent(share)}" for share, name in groups[:most]]
    if others := groups[most:]:
        told.append(f"{len(others)} other {_percent(sum(share for share, _ in others))}")
    return f"{_percent(sum(shares.values()))} of all weights: {', '.join(told)}"


def _percent(share: float) -> str:
    if share < 1e-4:
        return "under 0.01 %"
    return f"{100 * share:.{1 if share >= 0.01 else 2}f} %"


def finish(trainer: Trainer) -> None:
    """Write report.html and result.json, show the closing table. result.json comes last: with it a run is
    finished, and a run killed before does this again. A signal is noted: what is left to do here ends within
    the time that it leaves, while a dense branch would not. Raises Stopped before that."""
    with trainer.stop_request:
        _finish(trainer)
        if trainer.config.finetune_dense and trainer.should_stop(at_once=True):
            trainer.stop()


def _finish(trainer: Trainer) -> None:
    counts = _confusion(trainer)
    if not trainer.monitor:
        return
    if counts is not None:
        trainer.monitor.confused(counts, trainer.loaders.info.classes)
    result = build_result(trainer)
    _report(trainer.run_dir, result)
    trainer.monitor.scores(recipe_of(trainer.run_dir), result)
    trainer.run_dir.write_result(result)
    screen = trainer.monitor.screen
    screen.close()
    screen.console.print(closing_table(result))
    for line in closing_lines(result):
        screen.say(line)
    if trainer.run_dir.report.is_file():
        screen.say(f"report: {trainer.run_dir.report}")


def _report(run: RunDir, result: dict[str, Any]) -> None:
    """A page that fails, as where records of epochs are lost, costs the page: the run is finished. Raises
    OSError: the disk would not take the result either."""
    try:
        write_report(run, result)
    except OSError:
        raise
    except Exception as error:
        log.warning("no report: %s", error)


def _confusion(trainer: Trainer) -> Tensor | None:
    """See trainer.evaluate.confusion, summed over ranks, on the CPU. None for noise, for very many classes,
    and where it fails on a rank or a signal comes to one: that costs a table, not the run, whose training is
    over."""
    config, classes = trainer.config, trainer.loaders.info.num_classes
    if getattr(config.data, "backend", None) == "synthetic" or classes > _MOST_CLASSES:
        return None

    def on_progress(done: int, total: int) -> None:
        if trainer.stop_request.number:  # no ranks are asked: one that has failed would not answer
            raise Interrupted("a signal came")
        if trainer.monitor:
            trainer.monitor.screen.working("most confused classes", done, total)

    classifier, test = trainer.engine.module, trainer.loaders.test
    computed = autocast(config, trainer.device)
    counts = None
    try:
        counts = confusion(classifier, test, trainer.position.epoch, computed, on_progress)
    except Exception as error:  # whatever it is; an uncompiled pass may need more memory than training
        log.warning("no table of the most confused classes: %s", (str(error).splitlines() or [""])[0])
    worked = all(ranks.all_gather(counts is not None))
    if counts is None or not worked:
        return None
    return ranks.sum_over_ranks(counts).cpu()


def finish_both(run: RunDir) -> None:
    """Put the finetuned dense model beside the pair that it belongs to."""
    result, dense = run.read_result(), RunDir(run.finetuned_dense).read_result()
    assert result is not None
    assert dense is not None
    for suffix in ("", EMA):
        if DENSE_TWIN + suffix in dense:
            result[FINETUNED_DENSE + suffix] = dense[DENSE_TWIN + suffix]
    _report(run, result)
    run.write_result(result)
    Screen(0, 0, 0).console.print(closing_table(result))


def build_result(trainer: Trainer) -> dict[str, Any]:
    """Accuracies in percent, sparsity as a share, what is not pruned as shares of all weights, FLOPs of one
    image (inference, at evaluation's size) and of the whole run (training, at the sizes trained on)."""
    acdc, position, pair = trainer.acdc, trainer.position, trainer.position.pair
    dense = trainer.flops.inference.forward()
    sparse = pair.get(SPARSE)
    return {
        "name": trainer.config.name,
        "schedule": str(acdc.schedule),
        "dense_twin": pair.get(DENSE_TWIN),
        "sparse": sparse,
        **{key: row for key, row in pair.items() if key.endswith(EMA)},
        "not_pruned": shares_unpruned(acdc.model, acdc.layers) if acdc.layers else None,
        "flops": {
            "inference_dense": dense,
            "inference_sparse": sparse["inference_flops"] if sparse else None,
            "inference_ratio": sparse["inference_flops"] / dense if sparse else None,
            "training_dense": position.dense_training_flops,
            "training": position.training_flops,
            "training_ratio": position.training_flops / position.dense_training_flops,
        },
        "speed": None if len(trainer.flops.sizes) > 1 else speed(trainer.run_dir.read_metrics()),
        "compile": {
            "graphs": num_graphs() - trainer.graphs_before,
            "recompilations": num_graphs() - (trainer.graphs_at_first or 0),
        },
        "kernels": len(acdc.kernels),  # layers that run one in sparse phases
        "seconds": position.seconds,
        "run": str(trainer.run_dir.path),
    }


def speed(records: list[dict[str, Any]]) -> dict[str, float] | None:
    """Images per second of training in dense and in compressed phases, and what the run's training takes of
    the time of as many dense epochs: medians over epochs of one image size, without the first of each kind,
    which compiles. None where a kind has no other."""
    rates: dict[str, list[float]] = {"dense": [], "sparse": []}
    for record in records:
        if record["kind"] == "epoch":
            rates[record["phase"]].append(record.get("images_per_second", 0.0))
    # 0: of an epoch whose rest, after a resume, was one step
    seen = {kind: [rate for rate in each[1:] if rate > 0] for kind, each in rates.items()}
    if not all(seen.values()):
        return None
    dense, compressed = (median(seen[kind]) for kind in ("dense", "sparse"))
    epochs = PhaseSchedule((("dense", len(rates["dense"])), ("sparse", len(rates["sparse"]))))
    return {
        "dense_images_per_second": dense,
        "compressed_images_per_second": compressed,
        "time_of_dense": epochs.time_share(dense / compressed),
    }
