"""`acdc schedule --cost`: what a recipe's training takes, from a few steps of it on this machine."""

from __future__ import annotations

import tempfile
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch

from sparsity import MaskError
from trainer.build import build_trainer
from trainer.config.data import ImageNetData
from trainer.config.optimization import LRConfig
from trainer.config.schema import Config, LogConfig, SaveConfig
from trainer.distributed import ranks
from trainer.engine import precision_name
from trainer.errors import UserError
from trainer.loaders import build_loaders
from trainer.loop import Trainer
from trainer.monitor.drawing import sparsity_asked
from trainer.monitor.flops import RunFlops
from trainer.monitor.screen import count
from trainer.monitor.terminal import announce

STEPS = 10  # at most: measured in each kind of phase, after as many that compile and choose kernels
_NEVER = "1000000000st"
_GENTLE = 1e-6  # of the recipe's learning rate: nothing diverges, masks are those of fresh weights


@dataclass(frozen=True)
class Measured:
    """rates: images a second, by kind of phase, over `steps` steps each. density: by layer, at the recipe's
    last sparsity. num_images: of an epoch. where: device and precision, for people."""

    rates: dict[str, float]
    steps: int
    density: dict[str, float]
    flops: RunFlops
    num_images: int
    where: str


def cost_lines(config: Config) -> list[str]:
    """What was measured, and what follows for the whole recipe. Raises UserError and EnvironmentFailure."""
    found = measure_cost(config)
    planned, dense = training_flops(config, found)
    rates = " and ".join(f"{kind} phases {rate:,.0f} img/s" for kind, rate in found.rates.items())
    lines = [
        f"measured    {rates}",
        f"            over {found.steps} steps each of {config.data.batch_size} images, on {found.where}",
        f"FLOPs       {count(planned)} of training, {planned / dense:.3f} of dense training's",
        _time(config, found),
        "            Evaluation, checkpoints and compiling come on top. Layers are as sparse as fresh",
        "            weights make them; trained weights spread otherwise.",
    ]
    if len(found.flops.sizes) > 1:
        lines.append("            Other sizes of images are taken to go by their FLOPs.")
    return lines


def measure_cost(config: Config) -> Measured:
    """Train a few steps of a recipe like it, in a folder that is removed afterwards."""
    device = ranks.start()
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "run"
            steps = _steps(config, device)
            with closing(build_trainer(trial_of(config, steps), device, path, announce)) as trainer:
                announce("measuring", f"{steps} steps in each kind of phase, after {steps} that compile")
                rates = _rates(trainer)
                density = trainer.sparsity().density_by_layer
                images = trainer.loaders.train.num_images
    except MaskError as error:
        raise UserError(f"sparsity: {error}") from error
    if config.steps_per_epoch is not None:
        images = min(images, config.steps_per_epoch * config.data.batch_size)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    where = f"1 x {name} in {precision_name(config, device)}"
    return Measured(rates, trainer.steps_per_epoch, density, _flops(config, trainer.flops), images, where)


def _steps(config: Config, device: torch.device) -> int:
    """Of a short epoch: STEPS, or all that a small data set has."""
    train = build_loaders(config, device).train
    return min(STEPS, train.batches_per_epoch // config.engine.accumulation_steps)


def _flops(config: Config, trial: RunFlops) -> RunFlops:
    """Of a recipe from those of its trial, which has later sizes of images later."""
    if not isinstance(config.data, ImageNetData):
        return trial
    begins = [epoch for epoch, _ in config.data.sizes]
    return RunFlops(trial.inference, tuple(zip(begins, (flops for _, flops in trial.sizes), strict=True)))


def trial_of(config: Config, steps: int) -> Config:
    """Two short epochs of each kind that the recipe has, compressed as at its end, on images of the first
    epoch's size; all else as it is."""
    kinds = [kind for kind in ("dense", "sparse") if f"{kind} " in str(config.sparsity.build_schedule())]
    phases = {
        "schedule": ", ".join(f"{kind} 2" for kind in kinds),
        "gradual": None,
        "regrowth": None,
        "recompute_batch_norm": None,
    }
    data, epochs = config.data, 2 * len(kinds)
    if isinstance(data, ImageNetData):
        later = [[epoch + epochs if epoch else 0, side] for epoch, side in data.image_sizes]
        data = data.model_copy(update={"image_sizes": later})
    return config.model_copy(
        update={
            "epochs": epochs,
            "data": data,
            "steps_per_epoch": steps,
            "sparsity": config.sparsity.model_copy(update=phases),
            "optimizer": config.optimizer.model_copy(update={"lr": _GENTLE * config.optimizer.lr}),
            "lr": LRConfig(kind="constant"),
            "model": config.model.model_copy(update={"weights": None, "weights_key": None}),
            "resume": None,
            "checkpoint": None,
            "finetune_dense": False,
            "save": SaveConfig(every=_NEVER),
            "log": LogConfig(every=_NEVER),
        }
    )


def _rates(trainer: Trainer) -> dict[str, float]:
    """Of each kind of phase its second epoch's: in the first it compiles, compresses and chooses kernels. An
    epoch ends with its counts read from the device."""
    position = trainer.position
    rates: dict[str, float] = {}
    for epoch in range(trainer.config.epochs):
        begun = time.perf_counter()
        trainer.train_epoch(epoch)
        images = trainer.steps_per_epoch * trainer.config.data.batch_size
        rates[trainer.acdc.phase.kind] = images / (time.perf_counter() - begun)
        position.epoch, position.step, position.totals = epoch + 1, 0, [0.0] * 4
    return rates


def training_flops(config: Config, found: Measured) -> tuple[float, float]:
    """Of the whole run as planned, and of as many dense epochs. In gradual pruning every layer's sparsity
    grows in proportion."""
    planned = dense = 0.0
    most = getattr(config.sparsity.build_pattern(), "sparsity", 0.0) or 1.0
    for epoch, asked in enumerate(sparsity_asked(config)):
        flops, share = found.flops.at(epoch), asked / most
        density = {name: 1 - share * (1 - kept) for name, kept in found.density.items()}
        planned += found.num_images * flops.training(density)
        dense += found.num_images * flops.training()
    return planned, dense


def seconds(config: Config, found: Measured) -> tuple[float, float | None]:
    """Of training as planned, and of as many dense epochs; None where no dense phase was measured."""
    schedule, first = config.sparsity.build_schedule(), found.flops.at(0).forward()
    planned = dense = 0.0
    for epoch in range(config.epochs):
        images = found.num_images * found.flops.at(epoch).forward() / first
        planned += images / found.rates[schedule.phase_at(epoch).kind]
        dense += images / found.rates.get("dense", 1.0)
    return planned, dense if "dense" in found.rates else None


def _time(config: Config, found: Measured) -> str:
    planned, dense = seconds(config, found)
    against = "" if dense is None else f", {planned / dense:.2f} of dense training's {_duration(dense)}"
    return f"time        {_duration(planned)} of training{against}"


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:,.1f} hours" if seconds >= 3600 else f"{seconds / 60:.1f} minutes"
