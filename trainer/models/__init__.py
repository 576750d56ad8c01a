"""Models by name: get_model("resnet20", num_classes=10)."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from trainer.models.resnet import ResNetCIFAR

MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet_cifar": ResNetCIFAR,
    "resnet20": partial(ResNetCIFAR, 20),
    "resnet32": partial(ResNetCIFAR, 32),
    "resnet44": partial(ResNetCIFAR, 44),
    "resnet56": partial(ResNetCIFAR, 56),
}


def get_model(name: str, num_classes: int, **arguments: Any) -> nn.Module:
    """Build a freshly initialised model.

    arguments: what the model takes besides (depth, width, in_channels). Raises ValueError for an unknown
    name, an argument that the model does not take, or a value that it refuses.
    """
    if name not in MODELS:
        near = difflib.get_close_matches(name, MODELS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown model {name!r}{hint} One of: {', '.join(MODELS)}")
    try:
        return MODELS[name](num_classes=num_classes, **arguments)
    except TypeError as error:
        raise ValueError(f"model {name!r} with {arguments}: {error}") from error
