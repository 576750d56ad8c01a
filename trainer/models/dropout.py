"""Dropout whose random numbers a CPU makes fast: a hash of every element's place and one seed a call.

torch draws a CPU's dropout one number after the other, compiled or not. A hash is computed in vectors, fused
with what is around it, and anew in the backward pass instead of being stored. On a GPU torch's own way is
parallel already, and is used.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_SEEDS = 2**31 - 1


class Dropout(nn.Dropout):
    """nn.Dropout. On a CPU a call's seed comes from torch's generator, so torch.manual_seed repeats it."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.p in (0, 1) or input.device.type != "cpu":
            return super().forward(input)
        seed = torch.randint(_SEEDS, (), dtype=torch.int32)
        keep = uniform_bits(input.shape, seed) >= int(self.p * 2**31)
        return torch.where(keep, input / (1 - self.p), 0.0)


def uniform_bits(shape: torch.Size, seed: Tensor) -> Tensor:
    """int32 below 2^31, uniform, one for each place of a tensor of this shape; seed: int32, ().

    C. Wellons' lowbias32 over the place, twice with the seed between, in 32-bit arithmetic.
    """
    places = torch.arange(shape.numel(), dtype=torch.int32).view(shape)
    return _mix(_mix(places) ^ seed) & 0x7FFFFFFF


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 16)) * 0x7FEB352D
    x = (x ^ _shift(x, 15)) * (0x846CA68B - 2**32)
    return x ^ _shift(x, 16)


def _shift(x: Tensor, bits: int) -> Tensor:
    """To the right, zeros moving in."""
    return (x >> bits) & ((1 << (32 - bits)) - 1)
