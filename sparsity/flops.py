"""FLOPs of a model for one image, dense and with masks, counted as the paper does.

A multiply-add is 2 FLOPs. Convolution and linear layers: 2 * (kept weights) * (output positions), and one per
output for a bias. Besides: 2 per element for BatchNorm, 1 for a ReLU that is a module, k * k per output for
pooling. Training one image costs three forward passes, at the sparsity in force (Peste et al., NeurIPS 2021,
section 4).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

TRAINING_FACTOR = 3  # forward, gradient of the input, gradient of the weight


@dataclass(frozen=True)
class LayerFlops:
    """A convolution or linear layer. positions: outputs per kernel, so 2 * num_weights * positions FLOPs of
    GEMM."""

    name: str
    num_weights: int
    positions: int
    bias_flops: int

    def flops(self, density: float = 1.0) -> float:
        return 2 * self.num_weights * self.positions * density + self.bias_flops


@dataclass(frozen=True)
class ModelFlops:
    """One image's forward pass."""

    layers: tuple[LayerFlops, ...]
    norm: int
    relu: int
    pooling: int

    def forward(self, density: Mapping[str, float] | None = None) -> float:
        """FLOPs with the kept share of weights by layer name; layers not named, and all when None, are
        dense."""
        density = density or {}
        gemm = sum(layer.flops(density.get(layer.name, 1.0)) for layer in self.layers)
        return gemm + self.norm + self.relu + self.pooling

    def training(self, density: Mapping[str, float] | None = None) -> float:
        return TRAINING_FACTOR * self.forward(density)


def count_flops(model: nn.Module, input_shape: Sequence[int]) -> ModelFlops:
    """Count for one input of `input_shape` (channels, height, width). Nothing is computed: a copy on the meta
    device runs once, in evaluation mode."""
    probe = copy.deepcopy(model).to("meta").eval()
    layers: list[LayerFlops] = []
    other = {"norm": 0, "relu": 0, "pooling": 0}

    def record(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if isinstance(module, nn.Conv2d | nn.Linear):
                outputs = output.numel()
                channels = module.out_channels if isinstance(module, nn.Conv2d) else module.out_features
                bias = outputs if module.bias is not None else 0
                layers.append(LayerFlops(name, module.weight.numel(), outputs // channels, bias))
            elif isinstance(module, nn.BatchNorm2d):
                other["norm"] += 2 * output.numel()
            elif isinstance(module, nn.ReLU):
                other["relu"] += output.numel()
            elif isinstance(module, nn.AvgPool2d | nn.MaxPool2d):
                size = module.kernel_size
                height, width = (size, size) if isinstance(size, int) else size
                other["pooling"] += height * width * output.numel()
            elif isinstance(module, nn.AdaptiveAvgPool2d):
                other["pooling"] += inputs[0].numel()

        return hook

    for name, module in probe.named_modules():
        module.register_forward_hook(record(name))
    with torch.no_grad():
        probe(torch.empty(1, *input_shape, device="meta"))
    return ModelFlops(tuple(layers), **other)
