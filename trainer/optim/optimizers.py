"""Optimizers of recipes, and which parameters they decay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from trainer.config.optimization import OptimizerConfig


def build_optimizer(config: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer over the parameters of `model` that are trained: one group, as the paper decays BatchNorm
    and biases too; or a second one without weight decay."""
    groups = parameter_groups(config, model)
    shared: dict[str, Any] = {"params": groups, "lr": config.lr, "weight_decay": config.weight_decay}
    if config.name == "sgd":
        return torch.optim.SGD(**shared, momentum=config.momentum, nesterov=config.nesterov, fused=True)
    if config.name == "adamw":
        betas = config.betas[0], config.betas[1]
        return torch.optim.AdamW(**shared, betas=betas, eps=config.eps, fused=True)
    return torch.optim.RMSprop(
        **shared, alpha=config.alpha, eps=config.eps, momentum=config.momentum, foreach=True
    )


def parameter_groups(config: OptimizerConfig, model: nn.Module) -> Any:
    """What torch's optimizers take as parameters, without frozen ones. Not decayed, where the recipe says so,
    as in timm: vectors and scalars, whatever is called bias, and what a module names in its no_weight_decay()
    (timm's vision transformers: embeddings of positions and classes)."""
    if config.decay_norms_and_biases or config.weight_decay == 0:
        return [parameter for parameter in model.parameters() if parameter.requires_grad]
    named = {
        f"{path}.{name}".lstrip(".")
        for path, module in model.named_modules()
        if callable(listed := getattr(module, "no_weight_decay", None))
        for name in listed()
    }
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            spared = parameter.ndim <= 1 or name.endswith(".bias") or name in named
            (others if spared else decayed).append(parameter)
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]  # ZeRO takes no empty one


def check_state(optimizer: torch.optim.Optimizer, states: Mapping[str, Mapping[str, Any]]) -> None:
    """Whether the optimizer can go on from per-parameter states, by their keys. Raises ValueError where they
    are another optimizer's."""
    needed: set[str] = set()
    if isinstance(optimizer, torch.optim.AdamW):
        needed = {"exp_avg", "exp_avg_sq"}
    elif isinstance(optimizer, torch.optim.RMSprop):
        needed = {"square_avg"} | ({"momentum_buffer"} if optimizer.defaults["momentum"] else set())
    found = {key for state in states.values() for key in state}
    if isinstance(optimizer, torch.optim.SGD):
        needed = found & {"momentum_buffer"}  # momentum may be given up, or begin
    if found and found != needed:
        raise ValueError(
            f"its optimizer state is {', '.join(sorted(found))}, and {type(optimizer).__name__} as this "
            f"recipe has it keeps {', '.join(sorted(needed)) or 'momentum alone'}: go on with the optimizer "
            "that the run began with, or begin a new run from its weights, model.weights=RUN"
        )
