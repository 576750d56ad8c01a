"""Which layers run which kernel of a family: each distinct shape measured once, and kept for later runs."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsity.flops import Call
from sparsity.kernels.interface import Kernel, KernelFamily, KernelUnavailableError, Shape
from sparsity.kernels.measure import Measured

log = logging.getLogger(__name__)


class NoKernelError(RuntimeError):
    """Kernels are required, and a layer that should run one cannot; or none can."""


@dataclass(frozen=True)
class LayerChoice:
    """A layer: how it runs in compressed phases (None: dense), its shape and times, or why it was not
    measured."""

    layer: str
    kernel: Kernel | None
    shape: Shape | None = None
    measured: Measured | None = None
    reason: str = ""

    def as_record(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "layer": self.layer,
            "choice": "dense" if self.kernel is None else self.kernel.name,
            "shape": None if self.shape is None else self.shape._asdict(),  # type: ignore[attr-defined]
            "microseconds": None if self.measured is None else self.measured.as_dict(),
            "reason": self.reason,
        }

    def microseconds(self, kernel: Kernel | None) -> float:
        """Of a step with this kernel, or with None dense; 0 where nothing was measured."""
        if self.measured is None:
            return 0.0
        total = self.measured.conversion if kernel is not None and kernel.sparse_products == 0 else 0.0
        for number, timing in enumerate(self.measured.timings):
            sparse = kernel is not None and number < kernel.sparse_products
            total += timing.sparse if sparse and timing.sparse is not None else timing.dense
        return total


class Measurements:
    """What was measured before, by the family's key, in a JSON file. A damaged file is measured anew."""

    def __init__(self, path: Path, key: str, write: Callable[[Path, str], None]) -> None:
        """write: replaces a file by a text, whole or not at all. Where it raises OSError nothing is kept."""
        self.path, self._key, self._write = path, key, write
        try:
            self._all: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            entries = self._all.get(key, {})
            self.known = {_shape(text): Measured.of(values) for text, values in entries.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            self._all, self.known = {}, {}

    def write(self) -> None:
        entries = {"x".join(map(str, shape)): measured.as_dict() for shape, measured in self.known.items()}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._write(self.path, json.dumps({**self._all, self._key: entries}, indent=1))
        except OSError as error:
            log.warning("kernel timings are not kept for later runs: %s", error)


def _shape(text: str) -> Shape:
    return tuple(map(int, text.split("x")))


def choose_kernels(
    family: KernelFamily,
    layers: Mapping[str, nn.Module],
    calls: Mapping[str, Sequence[Call]],
    images: int,
    measurements: Measurements | None = None,
    required: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[LayerChoice]:
    """A choice for each layer. calls, images: as KernelFamily.shape takes them. required: take kernels
    that are right, faster or not; raises NoKernelError where a layer that should run one cannot."""
    shapes, reasons = candidates(family, layers, calls, images)
    known = {} if measurements is None else measurements.known
    torch.cuda.empty_cache()  # training holds most of the memory
    unknown = sorted(set(shapes.values()) - known.keys())
    for done, shape in enumerate(unknown):
        try:
            known[shape] = family.measure(shape)
        except (torch.OutOfMemoryError, KernelUnavailableError) as error:
            crowded = isinstance(error, torch.OutOfMemoryError)
            failed = [name for name, other in shapes.items() if other == shape]
            reasons.update(dict.fromkeys(failed, "no memory left to measure it" if crowded else str(error)))
            shapes = {name: shape for name, shape in shapes.items() if name not in failed}
        on_progress(done + 1, len(unknown))
    torch.cuda.empty_cache()
    if measurements is not None and unknown:
        measurements.write()
    if required:
        _check_required(shapes, reasons, known)
    choices = []
    for name in layers:
        layer_shape = shapes.get(name)
        measured = None if layer_shape is None else known[layer_shape]
        kernel = None if measured is None else family.choose(measured, required)
        choices.append(LayerChoice(name, kernel, layer_shape, measured, reasons.get(name, "")))
    return best_region(choices, family.between, required)


def candidates(
    family: KernelFamily, layers: Mapping[str, nn.Module], calls: Mapping[str, Sequence[Call]], images: int
) -> tuple[dict[str, Shape], dict[str, str]]:
    """(layer -> the shape to measure, layer -> why it runs dense)."""
    shapes: dict[str, Shape] = {}
    reasons: dict[str, str] = {}
    for name, layer in layers.items():
        found: Shape | str = "not run in a forward pass"
        if calls.get(name):
            found = family.shape(layer, calls[name], images)
        if isinstance(found, str):
            reasons[name] = found
        else:
            shapes[name] = found
    return shapes, reasons


def best_region(
    choices: list[LayerChoice], between: Kernel | None = None, required: bool = False
) -> list[LayerChoice]:
    """Without the kernels that cost more than they gain once changes of the memory format are counted.

    Within a region, a run of layers in the model's order, activations keep the kernels' format: a layer that
    runs dense there pays for changing it both ways, with the kernel `between`. At the region's ends it is
    changed once. All but the best region runs dense; required: the region is all.
    """
    conversion = [0.0 if each.measured is None else each.measured.conversion for each in choices]
    gains = [
        max(each.microseconds(None) - each.microseconds(each.kernel), -change) if each.kernel else -change
        for each, change in zip(choices, conversion, strict=True)
    ]
    best, begin, end = 0.0, 0, 0
    for first in range(len(choices)):
        total = 0.0
        for last in range(first, len(choices)):
            total += gains[last]
            gain = total - (conversion[first] + conversion[last]) / 2
            if choices[first].kernel and choices[last].kernel and gain > best:
                best, begin, end = gain, first, last + 1
    if required:
        running = [index for index, each in enumerate(choices) if each.kernel]
        begin, end = running[0], running[-1] + 1

    def chosen(index: int) -> Kernel | None:
        kernel = choices[index].kernel
        if not begin <= index < end:
            return None
        return kernel if kernel and (required or gains[index] > -conversion[index]) else between

    return [replace(each, kernel=chosen(index)) for index, each in enumerate(choices)]


def _check_required(
    shapes: Mapping[str, Shape], reasons: Mapping[str, str], known: Mapping[Shape, Measured]
) -> None:
    failed = {
        name: known[shape].forward.failure or "its results are wrong"
        for name, shape in shapes.items()
        if not known[shape].forward.right
    }
    if failed or not shapes:
        name, why = next(iter((failed or reasons).items()))
        raise NoKernelError(f"{len(failed) or len(reasons)} layers cannot run them, {name} first: {why}")


def gain(choices: Iterable[LayerChoice]) -> dict[str, float]:
    """Microseconds a step of the measured kernels, all dense and as chosen."""
    measured = [choice for choice in choices if choice.measured is not None]
    return {
        "dense_us": sum(choice.microseconds(None) for choice in measured),
        "chosen_us": sum(choice.microseconds(choice.kernel) for choice in measured),
    }
