"""Weights to start from. All else starts fresh: optimizer, epoch, masks.

a run folder                    its sparse model, or its dense twin while there is no sparse one
a checkpoint folder of ours     a training state or a saved model
a file                          see trainer.checkpoints.weight_files
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer.checkpoints.saved_model import build_model, find_model, load_model
from trainer.checkpoints.weight_files import read_weights


def load_weights(
    model: nn.Module, path: Path, key: str | None = None, description: Mapping[str, Any] | None = None
) -> list[str]:
    """Put the weights and statistics at `path` into `model`, and say what is to be known of them.

    key: where in a torch file, see read_weights. description: what the model was built from, see
    trainer.checkpoints.saved_model.describe_model. With it, layers whose shape follows from the number of
    classes may be missing at `path` or of another shape: they stay as they are in `model`.

    Raises FileNotFoundError or ValueError that names the file and what does not fit; the model is then as it
    was. Nothing in a file is executed.
    """
    ours = model.state_dict()
    told: list[str] = []
    if path.is_dir() and key is not None:
        raise ValueError(f"weights {path}: weights_key={key} is for a torch file, and this is a folder")
    if path.is_dir():
        state = dict(load_model(find_model(path))[0].state_dict())
    elif path.is_file():
        state, told = read_weights(path, key, ours)
    else:
        raise FileNotFoundError(f"weights {path}: no such file or folder")
    problems = _differences(ours, state)
    if problems and description is not None:
        head = head_layers(description, ours)
        fresh = {_layer(name) for name in problems} & head
        if fresh:
            told.append(_tell_of_head(ours, state, fresh))
            state = {name: value for name, value in state.items() if _layer(name) not in fresh}
            problems = {name: text for name, text in problems.items() if _layer(name) not in fresh}
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise ValueError(
            f"weights {path}: they are another model's; missing, unknown or of another shape: "
            f"{', '.join([*problems.values()][:4])}{more}"
        )
    for name, value in state.items():
        if not bool(value.isfinite().all()):
            raise ValueError(f"weights {path}: {name} holds NaN or infinite values")
    model.load_state_dict({**ours, **state})
    return told


def head_layers(description: Mapping[str, Any], ours: Mapping[str, Tensor]) -> set[str]:
    """Layers whose shape follows from the number of classes: those that differ in a model with one more."""
    with torch.random.fork_rng(devices=[]):
        other = build_model({**description, "num_classes": description["num_classes"] + 1}).state_dict()
    return {_layer(name) for name, value in ours.items() if other[name].shape != value.shape}


def _differences(ours: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, str]:
    """Name -> how it reads in a message."""
    found = {n: n for n in ours if n not in state and not n.endswith("num_batches_tracked")}
    found |= {name: name for name in state if name not in ours}
    for name in ours:
        if name in state and ours[name].shape != state[name].shape:
            found[name] = f"{name} {tuple(state[name].shape)}"
    return found


def _tell_of_head(ours: Mapping[str, Tensor], state: Mapping[str, Tensor], fresh: Collection[str]) -> str:
    first = next(name for name in ours if _layer(name) in fresh)
    here, there = len(ours[first]), len(state[first]) if first in state else None
    of = f"{there:,} classes there, {here:,} here" if there else f"not there; {here:,} classes here"
    return f"the head {', '.join(sorted(fresh))} starts fresh ({of})"


def _layer(name: str) -> str:
    return name.rpartition(".")[0]
