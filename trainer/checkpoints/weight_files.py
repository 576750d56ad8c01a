"""Tensors by name out of whatever file weights come in, as the model that they belong to names them.

FILE.ckpt                       a checkpoint of the paper's implementation
FILE.safetensors                names to tensors
FILE.pt, .pth, ...              a torch file: a state_dict, or a training checkpoint with one under some key
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.errors import did_you_mean
from trainer.originals.checkpoints import read_original, split_state

# Where training scripts put the state_dict; the first that is there counts. Lightning and timm, torchvision,
# others, DeepSpeed; then averaged weights, of timm and of torchvision
KEYS = ("state_dict", "model", "model_state_dict", "module", "state_dict_ema", "model_ema", "ema")
# What wrappers put before names: Lightning and Hugging Face; DataParallel and AveragedModel; torch.compile
_OUTER, _WRAPPER, _COMPILED = "model.", "module.", "_orig_mod."
_COUNTER = "n_averaged"  # AveragedModel's own entry
# Besides tensors and plain values, in most training checkpoints; none of them executes anything
_SCALAR = np.float64(0).__reduce__()[0]
_HARMLESS: list[Any] = [
    argparse.Namespace,
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
    np.dtype,
    *{type(np.dtype(kind)) for kind in (np.float32, np.float64, np.int64, np.bool_)},
]


def read_weights(path: Path, key: str | None, ours: Collection[str]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors by name, and what to tell of them. key: where in a torch file, dotted; None: under the
    first of KEYS that is there. ours: the model's names, which say what is a prefix and what is a name.

    Raises ValueError that names the file and what is wrong with it. Nothing in it is executed.
    """
    if key is not None and path.suffix in (".ckpt", ".safetensors"):
        raise ValueError(f"weights {path}: {path.suffix} has its weights in one place; leave weights_key out")
    if path.suffix == ".ckpt":
        masks, state = split_state(read_original(path)["model_state_dict"])
        for layer, mask in masks.items():
            if (weight := state.get(f"{layer}.weight")) is not None and weight.shape == mask.shape:
                state[f"{layer}.weight"] = weight * mask
        return dict(state), []
    content, told = (_read_safetensors(path), []) if path.suffix == ".safetensors" else _find(path, key)
    if not isinstance(content, Mapping) or not content or not all(map(_is_entry, content.items())):
        raise ValueError(
            f"weights {path}: it holds no state_dict, a table of names and plain tensors{_held(content)}"
        )
    state, left_out = _as_ours(content, ours)
    if left_out:
        told.append(f"{len(left_out)} entries beside {_OUTER}* left out, such as {left_out[0]}")
    return state, told


def _read_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"weights {path}: not a complete safetensors file: {error}") from error


def _find(path: Path, key: str | None) -> tuple[Any, list[str]]:
    """What a torch file has under the key, or where training scripts put it; and which that was, where there
    are several."""
    content = _read_torch(path)
    if key is not None:
        for part in key.split("."):
            if not isinstance(content, Mapping) or part not in content:
                there = [str(name) for name in content][:12] if isinstance(content, Mapping) else []
                raise ValueError(
                    f"weights {path}: there is no {part!r} of weights_key {key!r}"
                    f"{did_you_mean(part, there)} There are: {', '.join(there) or 'no keys'}"
                )
            content = content[part]
        return content, [f"under {key}"]
    if not isinstance(content, Mapping):
        return content, []
    there = [name for name in KEYS if isinstance(content.get(name), Mapping)]
    if not there:
        return content, []
    others = f"; weights_key={there[1]} takes the others" if len(there) > 1 else ""
    return content[there[0]], [f"under {there[0]}{others}"] if others else []


def _read_torch(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file makes of the reader; nothing in it is executed
        message = " ".join(str(error).split())
        if found := re.search(r"[Uu]nsupported (?:global|class|type)\S*:? (?:GLOBAL )?(\S+)", message):
            raise ValueError(
                f"weights {path}: it holds an object of {found[1]}, and nothing of a file is executed here; "
                "where it was made, store the weights alone: torch.save(model.state_dict(), FILE)"
            ) from error
        raise ValueError(f"weights {path}: no torch file of tensors: {message[:300]}") from error


def _as_ours(state: Mapping[str, Tensor], ours: Collection[str]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors without what wrappers put before their names, and the names beside an outer prefix."""
    names = {name: name.replace(_COMPILED, "").removeprefix(_WRAPPER) for name in state if name != _COUNTER}
    left_out: list[str] = []
    while not any(name in ours for name in names.values()):
        inner = {key: name for key, name in names.items() if name.startswith(_OUTER)}
        if not inner:
            break
        left_out += [key for key in names if key not in inner]
        names = {key: name.removeprefix(_OUTER).removeprefix(_WRAPPER) for key, name in inner.items()}
    return {name: state[key] for key, name in names.items()}, left_out


def _is_entry(item: tuple[Any, Any]) -> bool:
    name, value = item
    plain = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta
    return isinstance(name, str) and plain and not value.is_quantized and not value.is_complex()


def _held(content: Any) -> str:
    """The keys of a table that may hold one, and how to name it."""
    if not isinstance(content, Mapping):
        return ""
    tables = [str(key) for key, value in content.items() if isinstance(value, Mapping)]
    names = ", ".join(tables[:8])
    return f"; if one of these does, name it, model.weights_key=KEY: {names}" if tables else ""
