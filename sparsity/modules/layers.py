"""Convolutions and linear layers that multiply their weight by a keep-mask.

The mask is a persistent boolean buffer, `mask` (True: kept), of the weight's shape, all ones in dense phases,
and only ever updated in place: the forward pass has no branch on the phase, so a compiled graph stays valid
over phase switches, and autograd multiplies the weight's gradient by the mask.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsity.kernels.interface import Kernel


class RunsKernel(nn.Module):
    """In training, what `kernel` says computes, else the dense product. Evaluation is always dense, so that
    switching costs one further graph, not two."""

    mask: Tensor
    kernel: Kernel | None
    dense: Callable[[Tensor], Tensor]

    def forward(self, input: Tensor) -> Tensor:
        if self.training and self.kernel is not None:
            return self.kernel(self, input)
        return self.dense(input)

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script asks for."""
        raise ValueError(
            "torch.jit.script does not take masked layers: script acdc.export(), a copy without masks, or "
            "use torch.compile on the model itself"
        )

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        if self.kernel is not None:
            self.kernel.prepare(self)  # the mask may be another


class MaskedConv2d(RunsKernel, nn.Conv2d):
    """Conv2d of weight * mask. `mask`: bool, (out, in / groups, kh, kw)."""

    weight: nn.Parameter

    def dense(self, input: Tensor) -> Tensor:
        """With weight * mask."""
        return self._conv_forward(input, self.weight * self.mask, self.bias)


class MaskedLinear(RunsKernel, nn.Linear):
    """Linear of weight * mask. `mask`: bool, (out_features, in_features)."""

    weight: nn.Parameter

    def dense(self, input: Tensor) -> Tensor:
        """With weight * mask."""
        return functional.linear(input, self.weight * self.mask, self.bias)


class UnmaskedConv2d(RunsKernel, nn.Conv2d):
    """Conv2d between masked ones: it may compute in their kernels' memory format. `mask`: all ones, not
    kept."""

    dense = nn.Conv2d.forward

    @property
    def mask(self) -> Tensor:  # type: ignore[override]
        return torch.ones_like(self.weight, dtype=torch.bool)


class MaskedConv2dSame(MaskedConv2d):
    """As timm's Conv2dSame, which pads its input by its size, as TensorFlow does. No kernel does that."""

    def dense(self, input: Tensor) -> Tensor:
        pads: list[int] = []
        for side in (1, 0):  # functional.pad begins with the last dimension
            stride, reach = self.stride[side], self.dilation[side] * (self.kernel_size[side] - 1) + 1
            size = input.shape[2 + side]
            missing = max((math.ceil(size / stride) - 1) * stride + reach - size, 0)
            pads += [missing // 2, missing - missing // 2]
        return super().dense(functional.pad(input, pads))


MaskedLayer = MaskedConv2d | MaskedLinear
