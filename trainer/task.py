"""What a run trains: data, model, masks and what they cost, checked before there is an engine or a folder."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data.datasets import imagenet
from data.loader import ImageInfo
from sparsity import ACDC, NM, Transposable24, find_escaping
from sparsity.layers import UnmaskableError, patterns_of
from trainer.checkpoints.pretrained import Statistics, fetch, find_published, wanted_statistics
from trainer.checkpoints.saved_model import build_model, describe_model
from trainer.checkpoints.weights import load_weights
from trainer.config.data import ImageNetData
from trainer.config.schema import Config
from trainer.config.sparsity import SparsityConfig
from trainer.distributed import ranks
from trainer.engine import check_convolutions
from trainer.errors import as_user_error
from trainer.loaders import Loaders, build_loaders
from trainer.models.freeze import freeze
from trainer.models.mixing import check_pairs
from trainer.monitor.flops import RunFlops
from trainer.monitor.terminal import keep_quiet
from trainer.optim.rates import check_warmup
from trainer.paths import user_path

IMAGENET = (imagenet.MEAN, imagenet.STD)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """model_info: what a saved model carries along, see trainer.checkpoints.saved_model.describe_model.
    notes: what the run's first lines say besides, by what it is about."""

    config: Config
    device: torch.device
    loaders: Loaders
    acdc: ACDC
    model_info: dict[str, Any]
    flops: RunFlops
    notes: dict[str, str] = field(default_factory=dict)


def build_task(
    config: Config,
    device: torch.device,
    weights: str | None,
    began: Path | None = None,
    say: Callable[[str, str], None] = keep_quiet,
) -> Task:
    """weights: what to start from, as model.weights says it. began: a checkpoint that the run goes on from,
    or branches off. say: see trainer.build.build_trainer. Raises UserError and EnvironmentFailure."""
    say("reading", f"data, {config.data.name}")
    loaders = build_loaders(config, device)
    with as_user_error("model"):
        loaders.info = _normalised(loaders.info, config, began)
    say("building", config.model.name)
    model_info = describe_model(config, loaders.info)
    notes: dict[str, str] = {}
    torch.manual_seed(config.seed)
    with as_user_error("model"):
        model = build_model(model_info)
        if weights is not None:
            published = find_published(config.model.name, weights)
            path = fetch(published) if published else user_path(weights)
            told = load_weights(model, path, config.model.weights_key, model_info)
            notes["weights"] = "; ".join([weights, *told])
            if isinstance(config.data, ImageNetData) and (loaders.info.mean, loaders.info.std) != IMAGENET:
                notes["pixels"] = f"mean {loaders.info.mean}, std {loaders.info.std}"
        if config.model.freeze:
            notes["frozen"] = freeze(model, config.model.freeze)
    steps_per_epoch = loaders.train.batches_per_epoch // config.engine.accumulation_steps
    if config.mixing is not None:
        with as_user_error("mixing"):
            share = ranks.world_size() * config.engine.accumulation_steps
            check_pairs(config.data.batch_size // share)
    with as_user_error("lr"):
        check_warmup(config.lr, config.epochs, steps_per_epoch)
    with as_user_error("sparsity"):
        acdc = _build_acdc(config.sparsity, config.seed, model, steps_per_epoch)
    with as_user_error("model"):
        check_convolutions(model, device)
        flops = RunFlops.count(model, config.data, loaders.info.shape)
        _check_output(model, loaders.info)
    with as_user_error("sparsity"):
        _check_masks_hold(acdc, loaders.info, config.sparsity.exclude)
    return Task(config, device, loaders, acdc, model_info, flops, notes)


def _normalised(info: ImageInfo, config: Config, began: Path | None) -> ImageInfo:
    """The images with the mean and standard deviation that the recipe says, or that the weights want."""
    if not isinstance(config.data, ImageNetData):
        return info  # small images have their data set's own
    if config.data.mean is not None and config.data.std is not None:
        wanted: Statistics | None = (tuple(config.data.mean), tuple(config.data.std))
    else:
        wanted = wanted_statistics(config.model, began)
    return info if wanted is None else replace(info, mean=wanted[0], std=wanted[1])


def _build_acdc(config: SparsityConfig, seed: int, model: nn.Module, steps_per_epoch: int) -> ACDC:
    pattern, schedule = config.build_pattern(seed), config.build_schedule()
    try:
        acdc = ACDC(
            model,
            pattern,
            schedule,
            steps_per_epoch,
            include=config.include,
            exclude=config.exclude,
            gradual=config.build_gradual(),
            reset_momentum=config.reset_momentum,
        )
    except UnmaskableError as error:
        left_out = json.dumps([*config.exclude, *error.exclude])
        raise ValueError(f"{error.reason}; leave it dense with 'sparsity.exclude={left_out}'") from error
    if isinstance(pattern, NM | Transposable24):
        pattern(acdc.weights())  # an indivisible layer ends the run now, not at the first compression
        if layers := pattern.straddling(acdc.weights()):
            log.warning("%s without hardware support in %s", pattern, ", ".join(layers))
    return acdc


@torch.no_grad()
def _check_output(model: nn.Module, images: ImageInfo) -> None:
    """Before the loss would fail over it in its own words: a network may be anybody's."""
    training = model.training
    with torch.random.fork_rng(devices=[]):
        output = model.eval()(torch.zeros(1, *images.shape))
    model.train(training)
    shape = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
    if shape != (1, images.num_classes):
        raise ValueError(
            f"it gives {shape} for one image, where logits of {images.num_classes} classes are "
            f"(1, {images.num_classes})"
        )


def _check_masks_hold(acdc: ACDC, images: ImageInfo, excluded: list[str]) -> None:
    """Before the run, not at its first compressed step, possibly days later."""
    example = torch.randn(1, *images.shape, generator=torch.Generator().manual_seed(0))
    if acdc.layers and (names := find_escaping(acdc.model, acdc.layers, example)):
        left_out = json.dumps([*excluded, *patterns_of(names, list(acdc.layers))])
        raise ValueError(
            f"the model uses the weights of {len(names)} layers past the layer's own forward pass, where no "
            f"mask holds: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}; leave them dense with "
            f"'sparsity.exclude={left_out}'"
        )
