"""Weights to start from, out of whatever file they come in. All else starts fresh: optimizer, epoch, masks.

a run folder                    its sparse model, or its dense twin while there is no sparse one
a checkpoint folder of ours     a training state or a saved model
FILE.ckpt                       a checkpoint of the paper's implementation
FILE.safetensors                names to tensors
FILE.pt, .pth, ...              a torch file with a state_dict (torchvision's, timm's)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer.checkpoints.saved_model import find_model, load_model
from trainer.originals.checkpoints import read_original, split_state


def load_weights(model: nn.Module, path: Path) -> None:
    """Put the weights and statistics at `path` into `model`.

    Raises FileNotFoundError or ValueError that names the file and what does not fit; the model is then as it
    was. Nothing in a file is executed.
    """
    state = _read_state(path)
    ours = model.state_dict()
    problems = [name for name in ours if name not in state and not name.endswith("num_batches_tracked")]
    problems += [name for name in state if name not in ours]
    for name in ours:
        if name in state and ours[name].shape != state[name].shape:
            problems.append(f"{name} {tuple(state[name].shape)}")
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise ValueError(
            f"weights {path}: they are another model's; missing, unknown or of another shape: "
            f"{', '.join(problems[:4])}{more}"
        )
    for name, value in state.items():
        if not bool(value.isfinite().all()):
            raise ValueError(f"weights {path}: {name} holds NaN or infinite values")
    model.load_state_dict({**ours, **state})


def _read_state(path: Path) -> Mapping[str, Tensor]:
    if path.is_dir():
        return load_model(find_model(path))[0].state_dict()
    if not path.is_file():
        raise FileNotFoundError(f"weights {path}: no such file or folder")
    if path.suffix == ".ckpt":
        masks, state = split_state(read_original(path)["model_state_dict"])
        for layer, mask in masks.items():
            if (weight := state.get(f"{layer}.weight")) is not None and weight.shape == mask.shape:
                state[f"{layer}.weight"] = weight * mask
        return state
    return _named_tensors(
        path, _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    )


def _read_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"weights {path}: not a complete safetensors file: {error}") from error


def _read_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file makes of the reader; nothing in it is executed
        message = " ".join(str(error).split())[:300]
        raise ValueError(f"weights {path}: no torch file of tensors: {message}") from error


def _named_tensors(path: Path, content: Any) -> Mapping[str, Tensor]:
    """The state_dict itself, or under the key that training scripts put it; without DataParallel's prefix."""
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not content or not all(map(_is_entry, content.items())):
        raise ValueError(f"weights {path}: it holds no state_dict, a table of names and plain tensors")
    return {name.removeprefix("module."): value for name, value in content.items()}


def _is_entry(item: tuple[Any, Any]) -> bool:
    name, value = item
    plain = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta
    return isinstance(name, str) and plain and not value.is_quantized and not value.is_complex()
