"""FLOPs of a model for one image, dense and with masks, counted as the paper does.

A multiply-add is 2 FLOPs. Counted are the matrix products and convolutions that a forward pass runs, whether
by modules or by functions: of Conv2d and Linear layers and both projections of MultiheadAttention one by one,
so that density scales them; of the others (attention's two products of activations) together, dense. Of
modules besides: one per output for a layer's bias, 2 per element for BatchNorm, 1 for a ReLU, k * k per
output for pooling. What else works element by element is not counted: masks, LayerNorm, GELU, softmax, sums.
Training one image costs three forward passes, at the sparsity in force (Peste et al., NeurIPS 2021, section
4).
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

TRAINING_FACTOR = 3  # forward, gradient of the input, gradient of the weight


class Call(NamedTuple):
    """Of a layer, for one image. outputs: per kernel (output positions). height, width: of the input, 1 and
    the number of rows for a linear layer."""

    outputs: int
    height: int
    width: int

    @classmethod
    def of(cls, layer: nn.Module, input: Tensor, output: Tensor) -> Call:
        """input, output: of one image."""
        if isinstance(layer, nn.Conv2d):
            return cls(output[0, 0].numel(), *input.shape[-2:])
        rows = output.numel() // output.shape[-1]
        return cls(rows, 1, rows)


@dataclass(frozen=True)
class LayerFlops:
    """A convolution or linear layer.

    products: of its weight, dense. bias: of all calls; a weight that is used past its layer's forward pass
    has products that belong to no call.
    """

    name: str
    products: int
    bias: int
    calls: tuple[Call, ...]

    def flops(self, density: float = 1.0) -> float:
        return self.products * density + self.bias


@dataclass(frozen=True)
class ModelFlops:
    """One image's forward pass. products: of no layer's weight, dense whatever the masks."""

    layers: tuple[LayerFlops, ...]
    products: int
    norm: int
    relu: int
    pooling: int

    def forward(self, density: Mapping[str, float] | None = None) -> float:
        """FLOPs with the kept share of weights by layer name; layers that are not named are dense."""
        density = density or {}
        layers = sum(layer.flops(density.get(layer.name, 1.0)) for layer in self.layers)
        return layers + self.products + self.norm + self.relu + self.pooling

    def training(self, density: Mapping[str, float] | None = None) -> float:
        return TRAINING_FACTOR * self.forward(density)


def count_flops(model: nn.Module, input_shape: Sequence[int]) -> ModelFlops:
    """Count for one input of `input_shape` (channels, height, width). Nothing is computed: a copy on the meta
    device runs once, in evaluation mode."""
    probe = _on_meta(model).eval()
    counter = _Counter(probe)
    with torch.no_grad(), counter:
        probe(torch.empty(1, *input_shape, device="meta"))
    return counter.counted()


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts a forward pass of `model` within its context: products by operator, the rest by module.

    A product within a layer's call is that layer's. Any other product is the layer's whose weight is an
    operand, or a view of it, or the weight times a mask.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._products: dict[str | None, int] = defaultdict(int)  # None: of no layer
        self._bias: dict[str, int] = defaultdict(int)
        self._calls: dict[str, list[Call]] = defaultdict(list)
        self._other = {"norm": 0, "relu": 0, "pooling": 0}
        self._running: list[str] = []
        self._owners: dict[int, str] = {}
        self._masked: list[Tensor] = []  # kept, as others would get their storage
        self._projections: dict[str, int] = {}  # of attention with bias: inputs of an output
        for name, module in model.named_modules():
            own = dict(module.named_parameters(recurse=False))
            if isinstance(module, nn.MultiheadAttention):
                self._own_attention(f"{name}.".lstrip("."), module)
            if isinstance(module, nn.Conv2d | nn.Linear):
                if "weight" in own:
                    self._owners[_storage(own["weight"])] = name
                else:  # it is computed from others, or attention's
                    name = self._owners.get(_storage(module.weight), name)
                module.register_forward_pre_hook(partial(self._begin, name))
            module.register_forward_hook(partial(self._end, name), with_kwargs=True)

    def _own_attention(self, prefix: str, attention: nn.MultiheadAttention) -> None:
        """Its projections are called as layers only where they are masked, and not always then."""
        if attention.in_proj_weight is not None:
            self._owners[_storage(attention.in_proj_weight)] = f"{prefix}in_proj_weight"
        if attention.in_proj_bias is not None:
            names = (f"{prefix}in_proj_weight", f"{prefix}out_proj")
            self._projections |= dict.fromkeys(names, attention.embed_dim)

    def counted(self) -> ModelFlops:
        for name, inputs in self._projections.items():
            self._bias[name] = self._products.get(name, 0) // (2 * inputs)
        layers = [
            LayerFlops(name, products, self._bias[name], tuple(self._calls[name]))
            for name, products in self._products.items()
            if name is not None
        ]
        return ModelFlops(tuple(layers), self._products[None], **self._other)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        formula = flop_registry.get(func.overloadpacket)
        if formula is None:
            with self:  # what an operator that is made of others runs
                output = func.decompose(*args, **kwargs)
            if output is not NotImplemented:
                return output
        output = func(*args, **kwargs)
        by_mask = func is torch.ops.aten.mul.Tensor and getattr(args[1], "dtype", None) is torch.bool
        if by_mask and (owner := self._owners.get(_storage(args[0]))) is not None:
            self._masked.append(output)
            self._owners[_storage(output)] = owner
        if formula is not None:
            self._products[self._layer(args)] += formula(*args, **kwargs, out_val=output)
        return output

    def _layer(self, operands: Sequence[Any]) -> str | None:
        if self._running:
            return self._running[-1]
        storages = [_storage(operand) for operand in operands if isinstance(operand, Tensor)]
        return next((self._owners[storage] for storage in storages if storage in self._owners), None)

    def _begin(self, name: str, module: nn.Module, inputs: Any) -> None:
        self._running.append(name)

    def _end(
        self, name: str, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Tensor
    ) -> None:
        inputs = (*inputs, *named.values())
        if isinstance(module, nn.Conv2d | nn.Linear):
            self._running.pop()
            self._calls[name].append(Call.of(module, inputs[0], output))
            self._bias[name] += output.numel() if module.bias is not None else 0
        elif isinstance(module, nn.BatchNorm2d):
            self._other["norm"] += 2 * output.numel()
        elif isinstance(module, nn.ReLU):
            self._other["relu"] += output.numel()
        elif isinstance(module, nn.AvgPool2d | nn.MaxPool2d):
            size = module.kernel_size
            height, width = (size, size) if isinstance(size, int) else size
            self._other["pooling"] += height * width * output.numel()
        elif isinstance(module, nn.AdaptiveAvgPool2d):
            self._other["pooling"] += inputs[0].numel()


def _storage(tensor: Tensor) -> int:
    """Of a tensor and its views the same. On the meta device every address is 0."""
    return tensor.untyped_storage()._cdata


def _on_meta(model: nn.Module) -> nn.Module:
    """A copy without values. Parameters that modules share stay shared, unlike by `.to("meta")`."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.to("meta"), p.requires_grad) for p in model.parameters()}
    memo |= {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    return copy.deepcopy(model, memo)
