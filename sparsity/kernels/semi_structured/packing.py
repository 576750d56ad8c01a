"""2:4 weights without their zeros: half of the values, and two bits of place for each.

    values   (rows, columns / 2), the two kept of every four along the columns, in their order
    places   uint8, (rows, columns / 8), four places of two bits a byte, the first in the lowest bits

Kernels have layouts of their own; this one is for files and for the reference that kernels are compared with.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Packed24(NamedTuple):
    values: Tensor
    places: Tensor


def pack24(weight: Tensor) -> Packed24:
    """Pack (rows, columns) that are 2:4 along the columns, a multiple of 8. Of more than two non-zeros in a
    group the two first stay, as in what the hardware reads. Raises ValueError for another shape."""
    if weight.dim() != 2 or weight.shape[1] % 8:
        raise ValueError(
            f"2:4 packing takes (rows, columns), columns a multiple of 8, not {tuple(weight.shape)}"
        )
    groups = weight.reshape(weight.shape[0], -1, 4)
    # the non-zeros first, else in their order; then the first two in their order
    first = (groups == 0).to(torch.uint8).argsort(dim=2, stable=True)[..., :2].sort(dim=2).values
    values = groups.gather(2, first).flatten(1)
    quads = first.flatten(1).view(weight.shape[0], -1, 4).to(torch.uint8)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=weight.device)
    return Packed24(values, (quads << shifts).sum(2, dtype=torch.uint8))


def unpack24(packed: Packed24) -> Tensor:
    """The (rows, columns) that pack24 took."""
    values, places = packed
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=values.device)
    where = ((places[..., None] >> shifts) & 3).flatten(1).view(values.shape[0], -1, 2)
    groups = values.new_zeros(values.shape[0], where.shape[1], 4)
    return groups.scatter_(2, where.long(), values.view_as(where)).flatten(1)


def is_24(weight: Tensor) -> bool:
    """Whether of every four weights along the columns of (rows, columns) at most two are not 0."""
    return bool(fits_24(weight))


def fits_24(weight: Tensor) -> Tensor:
    """is_24 without reading the device: bool, ()."""
    return ((weight.reshape(weight.shape[0], -1, 4) != 0).sum(2) <= 2).all()
