"""From a configuration to a Trainer: every part made, checked and tied together, before any work starts."""

from __future__ import annotations

import fnmatch
import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data.loader import ImageInfo
from sparsity import ACDC, NM, Transposable24, find_escaping
from trainer.checkpoints import checkpoint, run_dir
from trainer.checkpoints.run_dir import DENSE_TWIN, RunDir
from trainer.checkpoints.saved_model import build_model, describe_model
from trainer.checkpoints.state import Position, branch_off, check_branch, restore
from trainer.checkpoints.weights import load_weights
from trainer.config.schema import Config, SparsityConfig
from trainer.distributed import ranks
from trainer.engine import build_engine, check_convolutions, deepspeed_config
from trainer.errors import Finished, UserError, as_user_error
from trainer.kernels import reason_unused
from trainer.loaders import build_loaders
from trainer.loop import Trainer
from trainer.models.classifier import Classifier
from trainer.monitor.flops import RunFlops
from trainer.monitor.records import Monitor
from trainer.monitor.screen import Screen
from trainer.optim import build_optimizer

log = logging.getLogger(__name__)


def build_trainer(config: Config, device: torch.device, path: Path | None = None) -> Trainer:
    """path: the run's folder, made and resumed where need be; default: what the configuration says.

    Raises UserError for what the user has to change and EnvironmentLacks for what has to be installed.
    """
    resumed = ranks.on_main(lambda: run_dir.find_resumed(config, path))
    loaders = build_loaders(config, device)
    model_info = describe_model(config, loaders.info)
    torch.manual_seed(config.seed)
    with as_user_error("model"):
        model = build_model(model_info)
        if config.model.weights is not None and resumed is None:
            load_weights(model, Path(config.model.weights).expanduser())
    steps_per_epoch = loaders.train.batches_per_epoch // config.engine.accumulation_steps
    with as_user_error("sparsity"):
        acdc = _build_acdc(config.sparsity, model, steps_per_epoch)
    with as_user_error("model"):
        check_convolutions(model, device)
        flops = RunFlops.count(model, config.data, loaders.info.shape)
    with as_user_error("sparsity"):
        _check_masks_hold(acdc, loaders.info, config.sparsity.exclude)
    reason_unused(config, device)  # what the recipe requires and the machine lacks is told now
    settings = deepspeed_config(config, device)
    branch = None
    if resumed is None and config.checkpoint is not None:
        branch = run_dir.read_branching_state(config.checkpoint)
        with as_user_error(f"checkpoint {branch[0]}"):
            check_branch(branch[1], acdc)
    folder = ranks.on_main(lambda: _open_folder(config, resumed, path))

    try:
        classifier = Classifier(model, loaders.info.mean, loaders.info.std)
        optimizer = build_optimizer(config.optimizer, classifier)
        engine = build_engine(classifier, optimizer, settings, config, device)
        acdc.attach(engine)
        position = Position()
        if branch is not None:
            position = branch_off(branch[1], engine, acdc)
        elif resumed is not None:
            with as_user_error(f"resume {resumed[1]}"):
                state = checkpoint.read(resumed[1], checkpoint.STATE)
                position = restore(state, engine, acdc, loaders.train, config.seed)
        if position.training_flops and not position.dense_training_flops:
            places = steps_per_epoch * config.data.batch_size
            flops.recount(position, min(places, loaders.train.num_images))
        ranks.on_main(lambda: _check_unfinished(folder, position, config))
        if position.epoch < acdc.schedule.num_epochs:
            ranks.on_main(lambda: _check_dense_twin(folder, position, config))
        monitor = None
        if ranks.is_main():
            screen = Screen(config.epochs * steps_per_epoch, acdc.step, config.epochs)
            monitor = _begin(folder, config, settings, screen, acdc.step)
    except BaseException:
        folder.release()
        raise
    return Trainer(config, acdc, engine, device, loaders, folder, monitor, model_info, flops, position)


def _build_acdc(config: SparsityConfig, model: nn.Module, steps_per_epoch: int) -> ACDC:
    pattern, schedule = config.build_pattern(), config.build_schedule()
    acdc = ACDC(
        model,
        pattern,
        schedule,
        steps_per_epoch,
        include=config.include,
        exclude=config.exclude,
        gradual=config.build_gradual(),
    )
    if isinstance(pattern, NM | Transposable24):
        pattern(
            acdc.weights()
        )  # a layer whose weights do not divide is told now, not at the first compression
        if layers := pattern.straddling(acdc.weights()):
            log.warning("%s without hardware support in %s", pattern, ", ".join(layers))
    return acdc


def _check_masks_hold(acdc: ACDC, images: ImageInfo, excluded: list[str]) -> None:
    """Before the run, not at its first compressed step, possibly days later."""
    example = torch.randn(1, *images.shape, generator=torch.Generator().manual_seed(0))
    if acdc.layers and (names := find_escaping(acdc.model, acdc.layers, example)):
        patterns = dict.fromkeys(_pattern(name, names, list(acdc.layers)) for name in names)
        left_out = json.dumps([*excluded, *patterns])
        raise ValueError(
            f"the model uses the weights of {len(names)} layers past the layer's own forward pass, where no "
            f"mask holds: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}; leave them dense with "
            f"'sparsity.exclude={left_out}'"
        )


def _pattern(name: str, names: list[str], layers: list[str]) -> str:
    """The shortest pattern for `name`, by its last parts, that matches none of `layers` but `names`."""
    parts = name.split(".")
    endings = ("*." + ".".join(parts[-count:]) for count in range(1, len(parts)))
    return next((end for end in endings if set(fnmatch.filter(layers, end)) <= set(names)), name)


def _open_folder(config: Config, resumed: tuple[RunDir, Path] | None, path: Path | None) -> RunDir:
    """The run's folder, locked and known to be writable."""
    folder = resumed[0] if resumed else run_dir.create(config, path)
    with as_user_error(f"run folder {folder.path}"):
        checkpoint.write_text(folder.path / ".writable", "")
        (folder.path / ".writable").unlink()
    folder.lock()
    return folder


def _check_unfinished(folder: RunDir, position: Position, config: Config) -> None:
    if position.epoch == config.epochs and folder.result.exists():
        raise Finished(f"{folder.path} is finished: its figures are in {folder.result}")


def _check_dense_twin(folder: RunDir, position: Position, config: Config) -> None:
    """A dense branch needs the dense twin, which must be ahead, or there. One that an earlier twin began is
    set aside when this run is about to make another."""
    if not config.finetune_dense:
        return
    dense = config.sparsity.build_schedule().last("dense")
    assert dense is not None  # the configuration has been checked
    if position.epoch < dense.end:
        checkpoint.set_folder_aside(folder.finetuned_dense)
    elif not (folder.checkpoints / DENSE_TWIN).exists():
        raise UserError(
            f"finetune_dense: the run begins in epoch {position.epoch}, behind the last dense phase, "
            "which ends "
            f"with epoch {dense.end - 1}: there will be no dense twin"
        )


def _begin(folder: RunDir, config: Config, settings: dict[str, Any], screen: Screen, step: int) -> Monitor:
    """Write what the run is, and set aside what a run resumed at `step` is about to do again."""
    with as_user_error(f"run folder {folder.path}"):
        checkpoint.set_aside(folder.checkpoints, step)
        folder.result.unlink(missing_ok=True)
        folder.write_config(config, settings)
        return Monitor(folder, screen, step)
