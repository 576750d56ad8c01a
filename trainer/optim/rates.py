"""Learning-rate schedules: constant within an epoch, as in the paper, or of each step."""

from __future__ import annotations

import math
from bisect import bisect_right

from trainer.config.durations import duration_steps
from trainer.config.optimization import LRConfig


def learning_rate(
    config: LRConfig, base_lr: float, epoch: int, num_epochs: int, step: int = 0, steps_per_epoch: int = 1
) -> float:
    """The learning rate of an epoch, or with lr.by=step of a step of it, both counted from 0.

    The clock counts epochs, or steps. During warm-up base_lr * (clock + 1) / warm-up. Then "cosine" falls
    from base_lr towards the floor, which the clock's end would reach; "step" multiplies by gamma from each
    milestone, an epoch, on; "constant" stays.
    """
    unit = steps_per_epoch if config.by == "step" else 1
    clock = epoch * unit + (step if config.by == "step" else 0)
    warmup = config.warmup_epochs * unit if config.warmup is None else duration_steps(config.warmup, unit)
    if clock < warmup:
        return base_lr * (clock + 1) / warmup
    if config.kind == "cosine":
        progress = (clock - warmup) / (num_epochs * unit - warmup)
        return config.floor + (base_lr - config.floor) * 0.5 * (1 + math.cos(math.pi * progress))
    if config.kind == "step":
        return base_lr * config.gamma ** bisect_right(config.milestones, epoch)
    return base_lr


def check_warmup(config: LRConfig, num_epochs: int, steps_per_epoch: int) -> None:
    """Raise ValueError for a warm-up as long as the run, once it is known how many steps an epoch has."""
    if config.warmup is None:
        return
    if duration_steps(config.warmup, steps_per_epoch) >= num_epochs * steps_per_epoch:
        raise ValueError(
            f"warmup {config.warmup} takes the whole run, {num_epochs} epochs of {steps_per_epoch} steps; "
            "shorten it"
        )
