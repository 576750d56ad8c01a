"""Bytes that a training step moves at the least, and how fast the device moves bytes: the memory roofline.

What is counted, over the operators of one uncompiled step (forward, backward, optimizer):
- A convolution, product or pooling reads its inputs and writes its outputs; a convolution's backward pass
  reads the gradient twice, for the input's gradient and for the weight's. Which place of a window is the
  greatest takes a byte, and pooling's backward pass reads nothing else beside the gradient.
- Element-wise operators in a row are one pass: it reads what the first ones read, once each, and writes the
  last result, when another kind of operator needs it. A result that is needed again is written by the first
  pass, and read from then on, where that moves less than making it anew.
- A reduction reads what leads to its input, and writes next to nothing.
- BatchNorm is a reduction (the statistics; backwards the two sums) and then element-wise.
- The optimizer reads weights, gradients and momentum, and writes weights and momentum.
So in ResNet50 statistics, normalisation with ReLU and addition, and convolutions are separate passes. Nothing
stays in a cache between them, and nothing is read twice because of a kernel's tiles: kernels that fuse these
passes, or find their input in a cache, can be faster than this roofline, and others cannot.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.shared.machine import timed

_OVERWRITING = ("copy_", "fill_", "zero_")  # what was in their first input is not read
_ELEMENTWISE = ("_to_copy", "clone", "threshold_backward", "ones_like", "zeros_like", *_OVERWRITING)
_REDUCTIONS = ("sum", "mean", "_log_softmax", "nll_loss_forward", "argmax")


class Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts within a `with` block. bytes: by kind of operator.

    Results of element-wise operators wait in _pending, by storage, with the tensors that they are made of.
    Every storage seen is kept, so that its address does not come again: count with small batches. Tensors are
    not: of a gradient that somebody else holds autograd makes a copy."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes: dict[str, int] = {}
        self._pending: dict[int, dict[int, int]] = {}  # storage -> storages that it is made of -> bytes
        self._used: set[int] = set()  # storages of pending results that something was made of
        self._kept: list[torch.UntypedStorage] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        outputs = func(*args, **(kwargs or {}))
        arguments, name = func._schema.arguments, func._schema.name.partition("::")[2]
        given = [*args, *(kwargs or {}).values()]
        inputs = _tensors(given)
        made = _tensors([outputs])
        self._kept += [tensor.untyped_storage() for tensor in (*inputs, *made)]
        if any(result.alias_info and not result.alias_info.is_write for result in func._schema.returns):
            return outputs  # a view
        if "empty" in name:
            return outputs  # memory that nothing has touched
        if "batch_norm" in name:
            large = _tensors(args[: 2 if "backward" in name else 1])
            self._read("batch norm", self._leaves(large))
            self._pend(made[:1], large)
        elif torch.Tag.pointwise in func.tags or name in _ELEMENTWISE:
            self._pend(made, inputs[1:] if name in _OVERWRITING else inputs)
        elif name in _REDUCTIONS:
            self._read("reductions", self._leaves(inputs))
        else:
            kind = "convolution" if "convolution" in name else "optimizer" if "sgd" in name else "other"
            if name == "max_pool2d_with_indices_backward":
                inputs = [inputs[0], inputs[-1]]  # of its input the operator needs the shape alone
            self._materialise(inputs)
            written = [
                value
                for argument, value in zip(arguments, given, strict=False)
                if argument.alias_info and argument.alias_info.is_write and argument.name != "grads"
            ]  # gradients are written for a loss scale alone
            twice = inputs[:1] if name == "convolution_backward" else []
            moved = [*inputs, *twice, *made, *_tensors(written)]
            self._add(kind, sum(map(_size, moved)))
        return outputs

    def _leaves(self, tensors: Iterable[Tensor]) -> dict[int, int]:
        found: dict[int, int] = {}
        for tensor in tensors:
            key, size = _key(tensor), _size(tensor)
            leaves = self._pending.get(key, {key: size})
            if key in self._used and sum(leaves.values()) > size:
                self._add("element-wise", size)
                leaves = self._pending[key] = {key: size}
            if key in self._pending:
                self._used.add(key)
            found |= leaves
        return found

    def _pend(self, made: list[Tensor], inputs: list[Tensor]) -> None:
        leaves = self._leaves(inputs)
        for tensor in made:
            self._pending[_key(tensor)] = leaves

    def _materialise(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            if (leaves := self._pending.pop(_key(tensor), None)) is not None:
                self._read("element-wise", leaves)
                self._add("element-wise", _size(tensor))

    def _read(self, kind: str, leaves: Mapping[int, int]) -> None:
        self._add(kind, sum(leaves.values()))

    def _add(self, kind: str, count: int) -> None:
        self.bytes[kind] = self.bytes.get(kind, 0) + count


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _size(tensor: Tensor) -> int:
    """Bytes; of an expanded tensor those that exist, of indices and labels one each."""
    if tensor.dtype == torch.int64:
        return tensor.numel()
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def copy_bandwidth(device: torch.device, repeats: int = 10) -> float:
    """Bytes per second, read and written, of a large copy on the device."""
    source = torch.ones((2**31 if device.type == "cuda" else 2**28) // 4, device=device)
    target = torch.empty_like(source)
    seconds = min(timed(lambda: target.copy_(source), device) for _ in range(repeats))
    return 2 * source.numel() * source.element_size() / seconds
