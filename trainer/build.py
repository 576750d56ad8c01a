"""From a configuration to a Trainer: every part made, checked and tied together, before any work starts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from data.atomic import write_text
from data.loader import Loader
from trainer.checkpoints import checkpoint, run_dir
from trainer.checkpoints.run_dir import DENSE_TWIN, RunDir
from trainer.checkpoints.state import Position, branch_off, check_branch, restore
from trainer.config.changes import Change, changes, check_changes, with_beginning
from trainer.config.schema import Config
from trainer.distributed import ranks
from trainer.engine import (
    build_engine,
    check_precision,
    check_same_precision,
    deepspeed_config,
    precision_name,
)
from trainer.errors import Finished, UserError, as_user_error
from trainer.kernels import find_family
from trainer.loop import Trainer
from trainer.models.classifier import Classifier
from trainer.monitor.drawing import draw_schedule
from trainer.monitor.records import Monitor
from trainer.monitor.screen import Screen
from trainer.monitor.terminal import keep_quiet
from trainer.monitor.tracking import Tracking
from trainer.optim import build_optimizer
from trainer.optim.averages import Averages
from trainer.task import Task, build_task

log = logging.getLogger(__name__)


def build_trainer(
    config: Config,
    device: torch.device,
    path: Path | None = None,
    say: Callable[[str, str], None] = keep_quiet,
) -> Trainer:
    """path: the run's folder, made and resumed where need be; default: what the configuration says. say: is
    told what begins and takes seconds, see trainer.monitor.terminal.announce.

    Raises UserError for what the user has to change and EnvironmentFailure for what has to be installed.
    """
    check_precision(config.engine, device)
    resumed = ranks.on_main(lambda: run_dir.find_resumed(config, path))
    branch = None
    if resumed is None and config.checkpoint is not None:
        branch = run_dir.read_branching_state(config.checkpoint)
    past: dict[str, Any] = {}  # info of the state that is resumed
    if resumed is not None:
        with as_user_error(f"resume {resumed[1]}"):
            past = checkpoint.read_info(resumed[1])
        config = with_beginning(config, past.get("config"))
    weights = config.model.weights if resumed is None else None
    began = resumed[1] if resumed is not None else branch[0] if branch is not None else None
    task = build_task(config, device, weights, began, say)
    if config.sparsity.accelerate == "require":
        find_family(config, device)  # raises where this machine does not have them
    check_same_precision(config, device)
    settings = deepspeed_config(config, device)
    if branch is not None:
        with as_user_error(f"checkpoint {branch[0]}"):
            check_branch(branch[1], task.acdc)
    folder = ranks.on_main(lambda: _open_folder(config, resumed, path))
    try:
        say("starting", "DeepSpeed's engine")
        info = task.loaders.info
        smoothing = config.loss.label_smoothing
        classifier = Classifier(task.acdc.model, info.mean, info.std, smoothing)
        optimizer = build_optimizer(config.optimizer, classifier)
        engine = build_engine(classifier, optimizer, settings, config, device)
        task.acdc.attach(engine)
        if config.ema is not None:
            engine.averages = Averages(task.acdc, config.ema.decay)
        position = _go_to(task, engine, branch, resumed)
        position.threads = position.threads or ranks.threads()
        changed = _changed(resumed, past, task, position)
        ranks.on_main(lambda: _check_folder(folder, position, config))
        if ranks.is_main():
            _tell(changed, past, task)
        monitor = _begin(folder, task, settings, changed) if ranks.is_main() else None
    except BaseException:
        folder.release()
        raise
    return Trainer(task, engine, folder, monitor, position)


def _go_to(
    task: Task, engine: Any, branch: tuple[Path, dict[str, Any]] | None, resumed: tuple[RunDir, Path] | None
) -> Position:
    """Where the run begins, with all parts put there: at its start, where another stands, where it was."""
    position = Position()
    if branch is not None:
        with as_user_error(f"checkpoint {branch[0]}"):
            position = branch_off(branch[1], engine, task.acdc)
    elif resumed is not None:
        with as_user_error(f"resume {resumed[1]}"):
            state = checkpoint.read(resumed[1], checkpoint.STATE)
            position = restore(state, engine, task.acdc, task.loaders.train, task.config.seed)
    if position.training_flops and not position.dense_training_flops:
        places = task.acdc.steps_per_epoch * task.config.data.batch_size
        task.flops.recount(position, min(places, task.loaders.train.num_images))
    return position


def _changed(
    resumed: tuple[RunDir, Path] | None, past: Mapping[str, Any], task: Task, position: Position
) -> list[Change]:
    """What is another than so far, in the recipe and in the images that a run is evaluated on. Raises
    UserError for what may not be."""
    found = changes(past.get("config"), task.config)
    if resumed is not None:
        with as_user_error(f"resume {resumed[1]}"):
            check_changes(found, task.config, asdict(position))
    now = _test_images(task.loaders.test)
    if position.test_images not in (None, now):
        found.append(Change("test images", position.test_images, now))
    position.test_images = now
    return found


def _tell(changed: list[Change], past: Mapping[str, Any], task: Task) -> None:
    """What a resumed run does otherwise than before."""
    for change in changed:
        if change.is_free:
            log.info("%s", change)
        else:
            log.warning("%s, from step %d on", change, task.acdc.step)
    if not past:
        return
    # A run whose precision is left to the machine may go on in another one than before
    before = past.get("precision", "fp32")  # until it was recorded, "auto" was fp32 on every CPU
    now = precision_name(task.config, task.device)
    if task.config.engine.precision == "auto" and now != before:
        log.warning(
            "the run was in %s so far and goes on in %s, which engine.precision=auto is here; "
            "engine.precision=%s keeps to the former",
            before,
            now,
            before,
        )


def _test_images(loader: Loader) -> str:
    """Which they are: figures of others do not compare."""
    said = loader.fingerprint()
    return f"{loader.num_images:,} images, SHA-256 {said['data'][:16]}" if "data" in said else said["backend"]


def _open_folder(config: Config, resumed: tuple[RunDir, Path] | None, path: Path | None) -> RunDir:
    """The run's folder, locked and known to be writable."""
    folder = resumed[0] if resumed else run_dir.create(config, path)
    with as_user_error(f"run folder {folder.path}"):
        write_text(folder.path / ".writable", "")
        (folder.path / ".writable").unlink()
    folder.lock()
    return folder


def _check_folder(folder: RunDir, position: Position, config: Config) -> None:
    """Raises Finished, or UserError where a dense branch will lack its dense twin, which must be ahead, or
    there. A branch of an earlier twin is set aside when this run is about to make another."""
    over = position.epoch == config.epochs
    if over and folder.read_result() is not None:
        raise Finished(f"{folder.path} is finished: its figures are in {folder.result}")
    if over or not config.finetune_dense:
        return
    dense = config.sparsity.build_schedule().last("dense")
    assert dense is not None  # the configuration has been checked
    if position.epoch < dense.end:
        checkpoint.set_folder_aside(folder.finetuned_dense)
    elif not (folder.checkpoints / DENSE_TWIN).exists():
        raise UserError(
            f"finetune_dense: the run begins in epoch {position.epoch}, behind the last dense phase, "
            f"which ends with epoch {dense.end - 1}: there will be no dense twin"
        )


def _begin(folder: RunDir, task: Task, settings: dict[str, Any], changed: list[Change]) -> Monitor:
    """Write what the run is, and set aside what a resumed run is about to do again."""
    config, step = task.config, task.acdc.step
    screen = Screen(config.epochs * task.acdc.steps_per_epoch, step, config.epochs)
    with as_user_error(f"run folder {folder.path}"):
        checkpoint.set_aside(folder.checkpoints, step)
        folder.result.unlink(missing_ok=True)
        told = {change.key: {"then": change.then, "now": change.now} for change in changed}
        start = {"step": step, "ranks": ranks.world_size(), "threads": ranks.threads(), "changes": told}
        folder.write_config(config, settings, start)
        project = config.log.wandb
        tracking = Tracking(project, folder, config.model_dump(mode="json")) if project else None
        drawing = "\n".join(draw_schedule(config, task.acdc.steps_per_epoch))
        return Monitor(folder, screen, step, tracking, drawing)
