"""Checkpoints of the paper's implementation (IST-DASLab/ACDC), read without executing anything in them.

Such a file is a dict with `epoch`, `model_config`, `model_state_dict`, and states of an optimizer and a
scheduler whose classes it names. Only tensors are taken. In the state dict every convolution and linear layer
is wrapped:

    module.layer1.0.conv1._weight_mask     float keep-mask        (module. only in files from GPU runs)
    module.layer1.0.conv1._layer.weight    the weight, multiplied by its mask in sparse phases
    module.fc._bias_mask                   only before a layer's first phase switch
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.datasets import imagenet
from data.datasets.cifar import CIFAR10, CIFAR100
from trainer.models import get_model

# our model for each of the original's names
ARCHITECTURES = {"mobilenet": "mobilenetv1", "wideresnet": "wide_resnet28_10"}
# mean, standard deviation, image size of the data sets that it trains on
NORMALISATION = {
    "cifar10": (CIFAR10.mean, CIFAR10.std, 32),
    "cifar100": (CIFAR100.mean, CIFAR100.std, 32),
    "imagenet": (imagenet.MEAN, imagenet.STD, 224),
}
_INERT = re.compile(
    r"optimization\.|torch\.optim\.|numpy\.(_?core\.multiarray\.scalar|dtype|dtypes\.\w+)$|_codecs\.encode$"
)


class OriginalError(ValueError):
    """Not a checkpoint of the original, a damaged one, or one of another architecture."""


class _Inert:
    """Stands in for every class that a checkpoint names and we do not need: takes anything, does nothing."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


def load_original(path: str | Path, arch: str | None = None) -> tuple[nn.Module, dict[str, Tensor]]:
    """The plain model with the checkpoint's weights, and boolean keep-masks by layer name.

    arch: a name of trainer.models; default: what the file says of itself. Masks are given for the layers that
    have one with zeros; all ones means dense and is left out. Raises OriginalError naming the file and what
    is wrong.
    """
    content = read_original(Path(path))
    masks, state = split_state(content["model_state_dict"])
    name = arch or described_architecture(path, content)
    classifier = next((value for key, value in reversed(state.items()) if key.endswith("weight")), None)
    if classifier is None:
        raise OriginalError(f"{path}: its model_state_dict holds no weights")
    model = get_model(name, int(classifier.shape[0]))
    _check_layers(path, name, model.state_dict(), state)
    for layer, mask in masks.items():
        if f"{layer}.weight" not in state or mask.shape != state[f"{layer}.weight"].shape:
            raise OriginalError(f"{path}: the mask of {layer} does not fit a weight")
    keep = {layer: mask != 0 for layer, mask in masks.items() if not bool((mask != 0).all())}
    for layer, mask in keep.items():
        state[f"{layer}.weight"].mul_(mask)
    model.load_state_dict(state)
    return model, keep


def read_original(path: Path) -> dict[str, Any]:
    """The checkpoint's dict, with everything but tensors and plain values replaced by inert objects.

    Raises OriginalError when the file is damaged, is not such a checkpoint, or asks for anything that such
    checkpoints do not need; nothing is executed in any case.
    """
    if not path.is_file():
        raise OriginalError(f"{path}: no such file")
    try:
        named = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception as error:  # whatever a damaged file makes of the reader
        raise OriginalError(f"{path} is a damaged or incomplete checkpoint: {_first_line(error)}") from error
    if strange := [name for name in named if _INERT.match(name) is None]:
        raise OriginalError(
            f"{path} asks for {', '.join(strange)}, which no checkpoint needs; nothing was run"
        )
    try:
        with torch.serialization.safe_globals([(_Inert, name) for name in named]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise OriginalError(f"{path} is a damaged or incomplete checkpoint: {_first_line(error)}") from error
    state = content.get("model_state_dict") if isinstance(content, dict) else None
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise OriginalError(f"{path} is not a checkpoint of the original: no model_state_dict of tensors")
    return content


def describe_original(path: Path, arch: str | None, model: nn.Module) -> dict[str, Any]:
    """What a saved model carries along, see checkpoints.saved_model, as far as the file says it."""
    content = read_original(path)
    described = content.get("model_config")
    dataset = described.get("dataset") if isinstance(described, Mapping) else None
    mean, std, size = NORMALISATION.get(str(dataset), NORMALISATION["imagenet"])
    classes = list(model.state_dict().values())[-1].shape[0]
    return {
        "model": {
            "name": arch or described_architecture(path, content),
            "num_classes": classes,
            "arguments": {"in_channels": 3},
            "input_shape": [3, size, size],
            "mean": list(mean),
            "std": list(std),
        },
        "config": {"data": {"name": dataset, "batch_size": 128}, "engine": {"precision": "fp32"}},
        "epoch": content.get("epoch"),
        "imported_from": path.name,
    }


def split_state(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Masks by layer name, and the plain state dict without wrappers, from the original's state dict."""
    masks, plain = {}, {}
    for key, value in state.items():
        name = key.removeprefix("module.")
        if name.endswith("._weight_mask"):
            masks[name.removesuffix("._weight_mask")] = value
        elif not name.endswith("._bias_mask"):
            plain[name.replace("._layer.", ".")] = value
    return masks, plain


def described_architecture(path: str | Path, content: Mapping[str, Any]) -> str:
    """Our model's name for what the checkpoint says it is. Raises OriginalError when it does not say."""
    described = content.get("model_config")
    arch = described.get("arch") if isinstance(described, Mapping) else None
    if not isinstance(arch, str):
        raise OriginalError(f"{path} does not say its architecture; name it with --arch")
    return ARCHITECTURES.get(arch, arch)


def _check_layers(
    path: str | Path, name: str, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]
) -> None:
    missing = [key for key in ours if key not in theirs]
    unknown = [key for key in theirs if key not in ours]
    other = [key for key in ours if key in theirs and ours[key].shape != theirs[key].shape]
    problems = []
    for what, keys in (("lacks", missing), ("has besides", unknown), ("has in another shape", other)):
        if keys:
            more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
            problems.append(f"{what} {', '.join(keys[:4])}{more}")
    if problems:
        raise OriginalError(f"{path} is not a {name}: it {'; it '.join(problems)}")


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
