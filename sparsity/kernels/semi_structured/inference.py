"""A finished 2:4 model for inference: chosen layers keep their weight compressed, and multiply with that."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sparsity.kernels.semi_structured.operator import compress24, matmul24, reason_unsupported
from sparsity.kernels.semi_structured.packing import is_24


class PackedLinear24(nn.Module):
    """nn.Linear with its weight compressed, in `dtype`."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, dtype: torch.dtype) -> None:
        super().__init__()
        weight = layer.weight.detach().flatten(1)
        self.outputs = len(weight)
        self.register_buffer("compressed", compress24(weight.to(dtype)))
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().to(dtype))

    def forward(self, input: Tensor) -> Tensor:
        output = matmul24(input.flatten(0, -2), self.compressed, self.outputs)
        output = output.view(*input.shape[:-1], self.outputs)
        return output if self.bias is None else output + self.bias


class PackedConv24(PackedLinear24):
    """A 1 x 1 nn.Conv2d likewise; channels_last in and out."""

    def __init__(self, layer: nn.Conv2d, dtype: torch.dtype) -> None:
        super().__init__(layer, dtype)
        self.stride = layer.stride

    def forward(self, input: Tensor) -> Tensor:
        pixels = input[:, :, :: self.stride[0], :: self.stride[1]].permute(0, 2, 3, 1).contiguous()
        return super().forward(pixels).permute(0, 3, 1, 2)


def packable(model: nn.Module) -> list[str]:
    """Names of the linear layers and 1 x 1 convolutions whose weights are 2:4 and fit the kernels. Attention
    of torch uses its output projection's weight itself."""
    attention = [each.out_proj for each in model.modules() if isinstance(each, nn.MultiheadAttention)]
    return [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
        and not any(layer is projection for projection in attention)
        and reason_unsupported(layer, 0) is None
        and is_24(layer.weight.detach().flatten(1))
    ]


def pack_layers(model: nn.Module, names: Iterable[str], dtype: torch.dtype) -> None:
    """Replace these layers of `model` in place. Raises ValueError for one whose weight is not 2:4: the kernel
    would leave weights out."""
    layers = dict(model.named_modules())
    for name in names:
        layer = layers[name]
        if not isinstance(layer, nn.Linear | nn.Conv2d) or not is_24(layer.weight.detach().flatten(1)):
            raise ValueError(f"layer {name!r} is not a 2:4 layer")
        packed = PackedConv24(layer, dtype) if isinstance(layer, nn.Conv2d) else PackedLinear24(layer, dtype)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, packed)
