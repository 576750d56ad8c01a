"""Masks on disk: one bit a weight, a file for each compression."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.atomic import whole

_SHAPE = ".shape"


def save_masks(path: Path, masks: Mapping[str, Tensor]) -> None:
    """Write boolean keep-masks by layer name as an .npz file, at once: never half of it."""
    arrays = {}
    for name, mask in masks.items():
        arrays[name] = np.packbits(mask.cpu().numpy())
        arrays[name + _SHAPE] = np.asarray(mask.shape, np.int64)
    with whole(path) as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # no name is allow_pickle


def load_masks(path: Path) -> dict[str, Tensor]:
    """The masks that save_masks wrote: bool, of the weights' shapes. Raises OSError or ValueError."""
    masks = {}
    with path.open("rb") as file:
        try:
            with np.load(file, allow_pickle=False) as arrays:
                for name in arrays.files:
                    if name.endswith(_SHAPE):
                        continue
                    shape = tuple(arrays[name + _SHAPE].tolist())
                    bits = np.unpackbits(arrays[name], count=math.prod(shape))
                    masks[name] = torch.from_numpy(bits.astype(bool)).view(shape)
        except Exception as error:  # zipfile, zlib and numpy each have several for a damaged or absurd file
            raise ValueError(f"{path} is not a file of masks: {error}") from error
    return masks
