"""Models by name.

The names of MODELS are the paper's networks. "torchvision:NAME" is any classification model of torchvision,
"timm:NAME" any model of timm (an optional extra); both freshly initialised as those libraries do it.
"package.module:function" is a network of one's own, see trainer.models.factory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from trainer.errors import did_you_mean
from trainer.models.factory import from_factory
from trainer.models.mobilenet import MobileNetV1
from trainer.models.resnet import BasicBlock, Bottleneck, ResNet
from trainer.models.resnet_cifar import ResNetCIFAR
from trainer.models.wide_resnet import WideResNet

MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet18": partial(ResNet, BasicBlock, (2, 2, 2, 2)),
    "resnet34": partial(ResNet, BasicBlock, (3, 4, 6, 3)),
    "resnet50": partial(ResNet, Bottleneck, (3, 4, 6, 3)),
    "resnet101": partial(ResNet, Bottleneck, (3, 4, 23, 3)),
    "mobilenetv1": MobileNetV1,
    "wide_resnet28_10": WideResNet,
    "resnet_cifar": ResNetCIFAR,
    "resnet20": partial(ResNetCIFAR, 20),
    "resnet32": partial(ResNetCIFAR, 32),
    "resnet44": partial(ResNetCIFAR, 44),
    "resnet56": partial(ResNetCIFAR, 56),
}


def get_model(name: str, num_classes: int, **arguments: Any) -> nn.Module:
    """Build a freshly initialised model with logits over num_classes.

    arguments: what the model takes besides (depth, width, dropout, in_channels). Raises ValueError for an
    unknown name, an argument that the model does not take, a value that it refuses, or what fails in a
    function of one's own; ModuleNotFoundError without timm.
    """
    library, _, inner = name.partition(":")
    build: Callable[..., nn.Module]
    if library == "torchvision" and inner:
        build = _from_torchvision(inner)
    elif library == "timm" and inner:
        build, arguments = _from_timm(inner), {"in_chans": arguments.pop("in_channels", 3), **arguments}
    elif name in MODELS:
        build = MODELS[name]
    elif library and inner:
        return from_factory(name, num_classes, arguments)
    else:
        known = ", ".join([*MODELS, "torchvision:NAME", "timm:NAME", "package.module:function"])
        raise ValueError(f"unknown model {name!r}{did_you_mean(name, MODELS)} One of: {known}")
    try:
        return build(num_classes=num_classes, **arguments)
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"model {name!r} with {arguments}: {error}") from error


def _from_torchvision(name: str) -> Callable[..., nn.Module]:
    from data.torchvision_import import import_torchvision

    models = import_torchvision().models
    known = models.list_models(module=models)
    if name not in known:
        raise ValueError(f"torchvision has no classification model {name!r}{did_you_mean(name, known)}")

    def build(num_classes: int, in_channels: int = 3, **arguments: Any) -> nn.Module:
        if in_channels != 3:
            raise ValueError(f"torchvision's models take 3 input channels, the data has {in_channels}")
        return models.get_model(name, num_classes=num_classes, **arguments)

    return build


def _from_timm(name: str) -> Callable[..., nn.Module]:
    from data.torchvision_import import import_torchvision

    try:
        import_torchvision()  # which timm imports without the care it may need
        import timm
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"model timm:{name} needs timm: pip install 'acdc-train[timm]'") from error
    if not timm.is_model(name):
        raise ValueError(f"timm has no model {name!r}{did_you_mean(name, timm.list_models())}")
    return partial(timm.create_model, name)
