"""Sparse models on the disk without their zeros: a safetensors file that holds, of each sparse weight,

    NAME.values   its kept values, as trained, in the order of the weight
    NAME.kept     uint8, one bit a weight, the first in the highest: whether it is kept

and every other tensor as it is. The metadata tell the shapes. A weight is sparse where that takes fewer
bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SHAPES = "sparse"  # key of the metadata
BITS = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8)


def pack_bits(mask: Tensor) -> Tensor:
    """Any bool tensor, eight in a byte."""
    padded = torch.nn.functional.pad(mask.flatten().to(torch.uint8), (0, -mask.numel() % 8))
    return (padded.view(-1, 8) * BITS).sum(1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """What pack_bits was given, of that shape."""
    count = torch.Size(shape).numel()
    return (packed[:, None] & BITS).bool().flatten()[:count].view(shape)


def save(model: nn.Module, path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a plain model (ACDC.export) to a file. Needs safetensors."""
    from safetensors.torch import save_file

    tensors, shapes = dict(model.state_dict()), {}
    for name, weight in model.state_dict().items():
        kept = weight != 0
        bits = 8 * weight.element_size()
        if weight.is_floating_point() and int(kept.sum()) * bits + weight.numel() < weight.numel() * bits:
            shapes[name] = list(weight.shape)
            del tensors[name]
            tensors[f"{name}.values"], tensors[f"{name}.kept"] = weight[kept], pack_bits(kept)
    contiguous = {name: value.contiguous() for name, value in tensors.items()}
    save_file(contiguous, path, {**(metadata or {}), SHAPES: json.dumps(shapes)})


def read(path: Path) -> dict[str, Tensor]:
    """The model's whole state_dict, bit for bit. Raises ValueError for another kind of file. Needs
    safetensors."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            shapes: dict[str, Any] = json.loads((file.metadata() or {})[SHAPES])
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        for name, shape in shapes.items():
            values = state.pop(f"{name}.values")
            weight = values.new_zeros(shape)
            weight[unpack_bits(state.pop(f"{name}.kept"), tuple(shape))] = values
            state[name] = weight
    except (SafetensorError, KeyError, ValueError, TypeError, IndexError, RuntimeError) as error:
        raise ValueError(f"{path} is not a file of acdc export --format sparse: {error}") from error
    return state
