"""Models on disk: the dense twin, the sparse model, and any checkpoint of ours as a plain model again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from data.loader import ImageInfo
from trainer.checkpoints import checkpoint
from trainer.checkpoints.run_dir import DENSE_TWIN, SPARSE
from trainer.config.schema import Config
from trainer.models import get_model

MASK = ".mask"


def describe_model(config: Config, images: ImageInfo) -> dict[str, Any]:
    """What it takes to build the model again and to feed it, in plain values."""
    arguments = {**config.model.arguments, "in_channels": images.shape[0]}
    return {
        "name": config.model.name,
        "num_classes": images.num_classes,
        "arguments": arguments,
        "input_shape": list(images.shape),
        "mean": list(images.mean),
        "std": list(images.std),
        "classes": list(images.classes),
    }


def build_model(description: Mapping[str, Any]) -> nn.Module:
    """Raises ValueError for a model that get_model does not know or whose arguments it refuses."""
    return get_model(description["name"], description["num_classes"], **description["arguments"])


def save_model(
    folder: Path, model: nn.Module, info: Mapping[str, Any], state: Mapping[str, Any] | None = None
) -> None:
    """Write a plain model as a checkpoint of its own. info: "model" as describe_model gives it, and results.
    state: of the training at that moment, for runs that go on from there."""
    contents: dict[str, Any] = {checkpoint.MODEL: model.state_dict()}
    if state is not None:
        contents[checkpoint.STATE] = state
    checkpoint.save(folder, contents, info)


def find_model(path: Path) -> Path:
    """The checkpoint that `path` means: itself, or a run folder's sparse model, else its dense twin."""
    pair = [path / "checkpoints" / key for key in (SPARSE, DENSE_TWIN)]
    return next((folder for folder in pair if folder.is_dir()), path)


def load_model(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The plain model of a saved model or of a training state, and the checkpoint's info.

    Raises trainer.checkpoints.checkpoint.CheckpointError when it is neither or damaged.
    """
    info = checkpoint.read_info(folder)
    if not {"model", "config"} <= info.keys():
        raise checkpoint.CheckpointError(f"{folder} does not say which model it holds")
    if (folder / checkpoint.MODEL).exists():
        state = checkpoint.read(folder, checkpoint.MODEL)
    else:
        state = plain_state(checkpoint.read(folder, checkpoint.STATE)["model"])
    model = build_model(info["model"])
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise checkpoint.CheckpointError(f"{folder} does not fit its own model: {error}") from error
    return model, info


def plain_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A masked model's state_dict as a plain model's: masks multiplied into their weights and dropped.
    Raises ValueError for a mask without its weight."""
    plain = {name: value for name, value in state.items() if not name.endswith(MASK)}
    for name, mask in state.items():
        if name.endswith(MASK):
            _, weight = layer_of_mask(name, plain)
            if weight not in plain or plain[weight].shape != mask.shape:
                raise ValueError(f"another model: there is a mask, but no weight that fits it, for {weight}")
            plain[weight] = plain[weight] * mask
    return plain


def layer_of_mask(name: str, state: Mapping[str, Tensor]) -> tuple[str, str]:
    """The layer that a mask of a state_dict is of, by the name that ACDC has for it, and its weight: NAME and
    NAME.weight, or for attention's NAME.in_proj twice NAME.in_proj_weight."""
    layer = name.removesuffix(MASK)
    of_attention = f"{layer}_weight"
    if f"{layer}.weight" not in state and of_attention in state:
        return of_attention, of_attention
    return layer, f"{layer}.weight"
