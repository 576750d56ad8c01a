"""Which layers run which kernel of a family: each distinct shape measured once, and kept for later runs."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsity.kernels.interface import Kernel, KernelFamily, Shape
from sparsity.kernels.measure import Measured

log = logging.getLogger(__name__)


class NoKernelError(RuntimeError):
    """Kernels are required, and a layer that should run one cannot; or none can."""


@dataclass(frozen=True)
class LayerChoice:
    """A masked layer: how it runs in compressed phases (None: dense), its shape and times, or why it was not
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
            "shape": None if self.shape is None else self.shape._asdict(),
            "microseconds": None if self.measured is None else self.measured.as_dict(),
            "reason": self.reason,
        }


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
    return Shape(*map(int, text.split("x")))


def choose_kernels(
    family: KernelFamily,
    layers: Mapping[str, nn.Module],
    positions: Mapping[str, Iterable[int]],
    images: int,
    measurements: Measurements,
    required: bool = False,
) -> list[LayerChoice]:
    """A choice for each masked layer. positions, images: as candidates takes them. required: take kernels
    that are right, faster or not; raises NoKernelError where a layer that should run one cannot."""
    shapes, reasons = candidates(family, layers, positions, images)
    known = measurements.known
    torch.cuda.empty_cache()  # training holds most of the memory
    for unknown in sorted(set(shapes.values()) - known.keys()):
        try:
            known[unknown] = family.measure(unknown)
        except torch.OutOfMemoryError:
            crowded = [name for name, shape in shapes.items() if shape == unknown]
            reasons.update(dict.fromkeys(crowded, "no memory left to measure it"))
            shapes = {name: shape for name, shape in shapes.items() if name not in crowded}
    torch.cuda.empty_cache()
    measurements.write()
    if required:
        _check_required(shapes, reasons, known)
    choices = []
    for name in layers:
        shape = shapes.get(name)
        measured = None if shape is None else known[shape]
        kernel = None if measured is None else family.choose(measured, required)
        choices.append(LayerChoice(name, kernel, shape, measured, reasons.get(name, "")))
    return choices


def candidates(
    family: KernelFamily,
    layers: Mapping[str, nn.Module],
    positions: Mapping[str, Iterable[int]],
    images: int,
) -> tuple[dict[str, Shape], dict[str, str]]:
    """(layer -> the shape to measure, layer -> why it runs dense), over masked layers.

    positions: output positions of one image, by layer, for every call at every image size that is trained
    on; a layer must fit at all of them and is measured at the greatest. images: of a step on one device.
    """
    shapes, reasons = {}, {}
    for name, layer in layers.items():
        counts = sorted(positions.get(name, ()))
        if not counts:
            reasons[name] = "not run in a forward pass"
            continue
        why = next(filter(None, (family.reason_unsupported(layer, n * images) for n in counts)), None)
        if why is not None:
            reasons[name] = why
            continue
        outputs, inputs = layer.weight.shape[:2]  # type: ignore[index]
        shapes[name] = Shape(counts[-1] * images, int(inputs), int(outputs))
    return shapes, reasons


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
    dense = chosen = 0.0
    for choice in choices:
        if choice.measured is None:
            continue
        kernel, measured = choice.kernel, choice.measured
        both = (measured.forward, kernel is not None), (measured.gradient, kernel and kernel.sparse_gradient)
        for timing, sparse in both:
            if timing is not None:
                dense += timing.dense
                chosen += timing.sparse if sparse and timing.sparse is not None else timing.dense
    return {"dense_us": dense, "chosen_us": chosen}
