"""Parts of a network that do not train: frozen by name, as timm's `freeze` does it.

A frozen parameter has no gradient and no place in the optimizer: neither momentum nor weight decay moves it.
A BatchNorm whose parameters are all frozen normalises by its running statistics, in training too, and leaves
them as they are: else images of another kind would change what was to stay.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn

from trainer.errors import did_you_mean


def freeze(model: nn.Module, patterns: Iterable[str]) -> str:
    """Freeze the parameters that a pattern names, or whose module or a module around it one names. Returns
    what is frozen, for people.

    patterns: shell-style, over names as in model.named_modules() and named_parameters(): "layer1" is the
    whole layer, "*.bn1" each BatchNorm of that name. Raises ValueError for a pattern that names nothing, and
    where nothing is left to train.
    """
    patterns = list(patterns)
    parameters = dict(model.named_parameters())
    modules = [name for name, _ in model.named_modules() if name]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in (*modules, *parameters)):
            hint = did_you_mean(pattern, [*modules, *parameters])
            top = ", ".join(name for name, _ in model.named_children())
            raise ValueError(f"freeze: {pattern!r} names no part of the model{hint} Its parts: {top}")
    frozen = [name for name in parameters if any(_names(pattern, name) for pattern in patterns)]
    if len(frozen) == len(parameters):
        raise ValueError(f"freeze: {patterns} leave nothing to train")
    for name in frozen:
        parameters[name].requires_grad_(False)
    share = sum(parameters[name].numel() for name in frozen) / sum(p.numel() for p in parameters.values())
    return (
        f"{', '.join(patterns)}: {100 * share:.1f} % of the parameters, {len(frozen_norms(model))} BatchNorms"
    )


def _names(pattern: str, parameter: str) -> bool:
    """Whether the pattern names the parameter, or a module that it lies in."""
    parts = parameter.split(".")
    return any(fnmatchcase(".".join(parts[:count]), pattern) for count in range(1, len(parts) + 1))


def frozen_norms(model: nn.Module) -> list[nn.Module]:
    """BatchNorms that have parameters, all of them frozen."""
    norms = [layer for layer in model.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    return [
        norm
        for norm in norms
        if list(norm.parameters()) and not any(each.requires_grad for each in norm.parameters())
    ]
