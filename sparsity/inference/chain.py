"""Layers of a finished model that stand behind one another, computed in one call: called from Python, each
would cost some 30 microseconds, a tenth of what it computes for one image."""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparsity.kernels.unstructured import library, operator
from sparsity.kernels.unstructured.frozen import SIZES
from sparsity.kernels.unstructured.kernel import DTYPES
from sparsity.kernels.unstructured.plan import PAST_CACHES, Convolution

ALIGNED = 64  # bytes
Shape = tuple[int, ...]  # (N, C, H, W)

_numbers = itertools.count()


class Step(NamedTuple):
    """relu(layer(input) + other). layer: a convolution on a FrozenKernel. input, other: which of the chain's
    values, its inputs first, then what each step gives."""

    layer: Any
    input: int
    other: int | None
    relu: bool


class Chain(nn.Module):
    """steps: their layers stay modules of the model, with weights and biases that stay; their hooks are not
    called. inputs: how many; outputs: which values it returns. The same as its layers one by one, bit for
    bit. Memory for what is between is kept from call to call. Threads may share a chain."""

    def __init__(self, steps: Sequence[Step], inputs: int, outputs: Sequence[int]) -> None:
        super().__init__()
        self.steps, self.inputs, self.outputs = tuple(steps), inputs, tuple(outputs)
        self.dtype: torch.dtype = steps[0].layer.kernel.dtype
        self._added = frozenset(step.other for step in steps)
        geometry = [(Convolution.of(layer), layer.weight.shape, *how) for layer, *how in steps]
        self.digest = hashlib.sha256(repr((geometry, self.outputs)).encode()).hexdigest()[:16]
        self._begin()

    def _begin(self) -> None:
        self.number = next(_numbers)
        operator.CHAINS[self.number] = self
        self._known: dict[tuple[Shape, ...], _Program | None] = {}  # by shapes of inputs, oldest first
        self._memory: Tensor | None = None  # while no thread uses it
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        own = ("_known", "_memory", "_lock")
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._begin()

    def forward(self, *inputs: Tensor) -> Sequence[Tensor]:
        if not self._takes(inputs):
            return self._one_by_one(inputs)
        maps = [operator.as_innermost(each.to(self.dtype)) for each in inputs]
        found: Sequence[Tensor] = operator.infer_chain(maps, self.number, self.digest)
        return found

    def _takes(self, inputs: Sequence[Any]) -> bool:
        """Whether they are maps, and those added of its dtype: others would be added unrounded."""
        if not all(
            isinstance(each, Tensor) and each.dim() == 4 and each.device.type == "cpu" for each in inputs
        ):
            return False
        autocast = torch.is_autocast_enabled("cpu")
        dtypes = [torch.get_autocast_dtype("cpu") if autocast else each.dtype for each in inputs]
        known = all(each.dtype in DTYPES.values() for each in inputs)
        as_added = all(each.dtype == self.dtype for value, each in enumerate(inputs) if value in self._added)
        return known and as_added and all(dtype == self.dtype for dtype in dtypes)

    def _one_by_one(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        values = list(inputs)
        for layer, input, other, relu in self.steps:
            values.append(layer(values[input], None if other is None else values[other], relu))
        return [values[value] for value in self.outputs]

    def shapes(self, inputs: Sequence[Sequence[int]]) -> list[Shape]:
        """Of all values. inputs: shapes of inputs."""
        shapes = [tuple(shape) for shape in inputs]
        for step in self.steps:
            shape: Any = _product(step, shapes)
            if step.other is not None:
                shape = torch.broadcast_shapes(shape, shapes[step.other])  # type: ignore[no-untyped-call]
            shapes.append(shape)
        return shapes

    def compute(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """forward, of maps in its dtype; a model's compiled code calls it by its number."""
        sizes = tuple(tuple(each.shape) for each in inputs)
        with self._lock:
            program = self._known[sizes] if sizes in self._known else self._learn(sizes)
            if program is not None:
                memory, self._memory = self._memory, None
        if program is None:
            with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
                return [operator.as_innermost(each) for each in self._one_by_one(inputs)]
        if memory is None or memory.numel() < program.bytes:
            memory = torch.empty(program.bytes, dtype=torch.uint8)
        values = dict(enumerate(map(operator.as_innermost, inputs)))
        for value in self.outputs:
            values[value] = operator.empty(inputs[0], *program.shapes[value])
        program.run(values, memory)
        self._memory = memory
        return [values[value] for value in self.outputs]

    def _learn(self, sizes: tuple[Shape, ...]) -> _Program | None:
        """What computes inputs of these shapes; None where a step is not for the library alone."""
        shapes = self.shapes(sizes)
        known = all(_is_known(step, shapes) for step in self.steps)
        if len(self._known) >= SIZES:
            del self._known[next(iter(self._known))]
        self._known[sizes] = _Program(self, shapes) if known else None
        return self._known[sizes]


def _product(step: Step, shapes: Sequence[Shape]) -> Shape:
    """The shape of what the layer itself gives."""
    images, _, height, width = shapes[step.input]
    return (images, len(step.layer.weight), *Convolution.of(step.layer).output_size(height, width))


def _is_known(step: Step, shapes: Sequence[Shape]) -> bool:
    """Whether the layer's plan computes the step."""
    layer, (images, channels, height, width) = step.layer, shapes[step.input]
    fits = layer.weight.dtype == torch.float32 and channels == layer.in_channels
    whole = step.other is None or shapes[step.other] == _product(step, shapes)
    reached = Convolution.of(layer).reaches(images, height, width)
    return fits and whole and reached and layer.kernel.plan is not None


class _Program:
    """A chain laid out for one size of its inputs."""

    def __init__(self, chain: Chain, shapes: list[Shape]) -> None:
        self.shapes = shapes
        self.bytes, self._offsets = _places(chain, shapes)
        self._steps = (library.Step * len(chain.steps))()
        self._pointed_at: list[Any] = []
        for number, (layer, input, other, relu) in enumerate(chain.steps):
            images, _, height, width = shapes[input]
            size, native = layer.kernel.plan.laid_out((height, width, images))
            bias = None if layer.bias is None else layer.bias.detach()
            self._pointed_at += [native, bias]
            output = chain.inputs + number
            self._steps[number] = library.Step(
                native.pointer,
                size,
                library.Epilogue(None if bias is None else bias.data_ptr(), None, relu),
                input,
                -1 if other is None else other,
                output,
                _bytes(shapes[output], chain.dtype) >= PAST_CACHES,
            )

    def run(self, values: dict[int, Tensor], memory: Tensor) -> None:
        """values: inputs and outputs. memory: for the others."""
        begin = memory.data_ptr()
        places = [
            values[value].data_ptr() if value in values else begin + offset
            for value, offset in enumerate(self._offsets)
        ]
        maps = (ctypes.c_void_p * len(places))(*places)
        library.run("layers_infer", self._steps, len(self._steps), maps)


def _places(chain: Chain, shapes: Sequence[Shape]) -> tuple[int, list[int]]:
    """(bytes of memory, where each value begins there; 0 for inputs and outputs): those that are needed at
    the same time lie apart."""
    last = {value: at for at, step in enumerate(chain.steps) for value in (step.input, step.other)}
    offsets, size = [0] * len(shapes), 0
    live: list[tuple[int, int, int]] = []  # (begin, end, which step uses it last)
    for at, value in enumerate(range(chain.inputs, len(shapes))):
        live = [each for each in live if each[2] >= at]
        if value in chain.outputs:
            continue
        begin, need = 0, -(-_bytes(shapes[value], chain.dtype) // ALIGNED) * ALIGNED
        for taken, end, _ in sorted(live):
            if begin + need <= taken:
                break
            begin = max(begin, end)
        offsets[value] = begin
        live.append((begin, begin + need, last.get(value, at)))
        size = max(size, begin + need)
    return size, offsets


def _bytes(shape: Shape, dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize
