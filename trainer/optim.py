"""Optimizers and learning-rate schedules. The learning rate is constant within an epoch, as in the paper."""

from __future__ import annotations

import math
from bisect import bisect_right

import torch
from torch import nn

from trainer.config.schema import LRConfig, OptimizerConfig


def build_optimizer(config: OptimizerConfig, model: nn.Module) -> torch.optim.SGD:
    """SGD over all parameters in one group: the paper decays BatchNorm and biases too."""
    return torch.optim.SGD(
        model.parameters(),
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
        fused=True,
    )


def learning_rate(config: LRConfig, base_lr: float, epoch: int, num_epochs: int) -> float:
    """The learning rate of an epoch, counted from 0.

    During warm-up base_lr * (epoch + 1) / warmup_epochs. Then "cosine" falls from base_lr towards 0, which
    the epoch after the last would reach; "step" multiplies by gamma from each milestone on; "constant" stays.
    """
    if epoch < config.warmup_epochs:
        return base_lr * (epoch + 1) / config.warmup_epochs
    if config.kind == "cosine":
        progress = (epoch - config.warmup_epochs) / (num_epochs - config.warmup_epochs)
        return base_lr * 0.5 * (1 + math.cos(math.pi * progress))
    if config.kind == "step":
        return base_lr * config.gamma ** bisect_right(config.milestones, epoch)
    return base_lr
