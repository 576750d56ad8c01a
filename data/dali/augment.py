"""data.augment in DALI's pipelines. On a GPU each image goes through the one branch that its operation needs;
on a CPU data.augment itself is applied to what the pipeline gives.

The five operations that move pixels are one branch, with matrices from the CPU. Arithmetic is torchvision's,
in float32 and cut off to whole numbers, so that rounding alone differs: by 1 of 255, and where a pixel comes
from the very edge between two.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.augment import OPERATIONS, Augment, apply_to_batch
from data.dali.pipeline import dense

_ON_CPU = (("INT32", ""), ("FLOAT", ""))
_ON_GPU = (("INT32", ""), ("FLOAT", ""), ("FLOAT", ""))
_MOVING = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
_BRANCH = {"Identity": "Same", **dict.fromkeys(_MOVING, "Moved")}
_BRANCHES = ("Same", "Moved", *(name for name in OPERATIONS[1:] if name not in _MOVING))
_BRANCH_OF = np.array([_BRANCHES.index(_BRANCH.get(name, name)) for name in OPERATIONS], np.int32)
_FACTORS = ("Brightness", "Color", "Contrast", "Sharpness")
_BLUR = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13


class Augmenter:
    """What a pipeline does of a stream's augmentation: nothing where there is none."""

    def __init__(self, augment: Augment | None, device: torch.device) -> None:
        self.augment = augment
        self.on_gpu = device.type == "cuda"
        self.inputs = () if augment is None else _ON_GPU if self.on_gpu else _ON_CPU

    def feed(self, draw: Any, height: int, width: int) -> tuple[NDArray[Any], ...]:
        """A batch of each of the inputs. draw: see data.stream.Draw. height, width: of its images."""
        if self.augment is None:
            return ()
        magnitudes = self.augment.magnitudes(draw.operations, draw.levels, height, width)
        if self.on_gpu:
            return prepared(draw.operations, magnitudes, height, width)
        return draw.operations, magnitudes

    def graph(
        self, dali: Any, outputs: tuple[Any, ...], drawn: Sequence[Any], grey: bool = False
    ) -> tuple[Any, ...]:
        """Output nodes. outputs: nodes, the images first. drawn: nodes of the inputs."""
        if self.augment is None:
            return outputs
        if not self.on_gpu:
            return (*drawn, *outputs)
        images = augmented(dali, outputs[0], drawn, self.augment.num_ops, grey)
        return (images, *outputs[1:])

    def taken(self, outputs: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
        """(what is left to apply, what the other outputs gave) of a run's outputs."""
        count = 0 if self.on_gpu else len(self.inputs)
        return outputs[:count], outputs[count:]

    def apply(self, images: Tensor, drawn: Sequence[Any]) -> Tensor:
        """The batch after what is left to apply."""
        if not drawn:
            return images
        operations, magnitudes = (dense(part).numpy() for part in drawn)
        return apply_to_batch(images, operations, magnitudes)


def prepared(
    operations: NDArray[np.int32], magnitudes: NDArray[np.float32], height: int, width: int
) -> tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.float32]]:
    """Of a batch, each (N, num_ops, ...): branches, numbers in _BRANCHES; matrices, (2, 3), from a pixel's
    place to where it comes from, x before y; parameters: factors, bits to keep, thresholds."""
    parameters = magnitudes.copy()
    parameters[np.isin(operations, [OPERATIONS.index(name) for name in _FACTORS])] += 1
    parameters[operations == OPERATIONS.index("Solarize")] *= 255
    bits = operations == OPERATIONS.index("Posterize")
    parameters[bits] = 256 - 2.0 ** (8 - parameters[bits])
    matrices = np.tile(np.eye(2, 3, dtype=np.float32), (*operations.shape, 1, 1))
    for place in map(tuple, np.argwhere(_BRANCH_OF[operations] == _BRANCHES.index("Moved"))):
        matrices[place] = _matrix(OPERATIONS[operations[place]], float(magnitudes[place]), height, width)
    return _BRANCH_OF[operations], matrices, parameters


def _matrix(operation: str, magnitude: float, height: int, width: int) -> list[list[float]]:
    x, y = width / 2, height / 2
    match operation:
        case "ShearX":
            return [[1, magnitude, 0], [0, 1, 0]]
        case "ShearY":
            return [[1, 0, 0], [magnitude, 1, 0]]
        case "TranslateX":
            return [[1, 0, -int(magnitude)], [0, 1, 0]]
        case "TranslateY":
            return [[1, 0, 0], [0, 1, -int(magnitude)]]
        case "Rotate":
            cos, sin = math.cos(math.radians(magnitude)), math.sin(math.radians(magnitude))
            return [[cos, -sin, x - cos * x + sin * y], [sin, cos, y - sin * x - cos * y]]
    raise AssertionError(operation)


def augmented(dali: Any, images: Any, inputs: Sequence[Any], num_ops: int, grey: bool) -> Any:
    """The node of augmented images. images: uint8, HWC. inputs: nodes of what `prepared` gives, on the CPU.
    grey: one channel. In a pipeline with conditionals: branches are conditions on nodes."""
    branches, matrices, parameters = inputs
    for k in range(num_ops):
        images = _one(dali, images, branches[k], matrices[k], parameters[k], grey)
    return images


def _one(dali: Any, images: Any, branch: Any, matrix: Any, parameter: Any, grey: bool) -> Any:
    from nvidia.dali.auto_aug.core import select

    return select(_FUNCTIONS, branch, dali, images, matrix, parameter, grey)


def _same(dali: Any, images: Any, matrix: Any, parameter: Any, grey: bool) -> Any:
    return images


def _moved(dali: Any, images: Any, matrix: Any, parameter: Any, grey: bool) -> Any:
    nearest = dali.types.INTERP_NN
    return dali.fn.warp_affine(images, matrix=matrix, fill_value=0, interp_type=nearest, inverse_map=True)


def _brightness(dali: Any, images: Any, matrix: Any, parameter: Any, grey: bool) -> Any:
    return _whole(dali, images * _beside(images, parameter))


def _color(dali: Any, images: Any, matrix: Any, parameter: Any, grey: bool) -> Any:
    return images if grey else _blend(dali, images, _grey(dali, images), parameter)


def _contrast(dali: Any, images: Any, matrix: Any, parameter: Any, grey: bool) -> Any:
    shades = dali.fn.cast(images, dtype=dali.types.FLOAT) if grey else _grey(dali, images)
    return _blend(dali, images, dali.fn.reductions.mean(shades, axes=(0, 1, 2), keep_dims=True), parameter)


def _sharpness(dali: Any, images: Any, matrix: Any, parameter: Any, grey: bool) -> Any:
    """The outermost pixels stay as they are."""
    fn, types = dali.fn, dali.types
    kernel = types.Constant(_BLUR, device=images.device)
    blurred = dali.math.floor(fn.filter(images, kernel, dtype=types.FLOAT) + 0.5)
    change = (blurred - images)[1:-1, 1:-1]
    size = fn.cast(images.shape()[0:2], dtype=types.INT32)
    pad = {"out_of_bounds_policy": "pad", "fill_values": 0}
    change = fn.slice(change, start=(-1, -1), shape=size, axes=(0, 1), **pad)
    return _whole(dali, images + change * (1 - _beside(images, parameter)))


def _posterize(dali: Any, images: Any, matrix: Any, parameter: Any, grey: bool) -> Any:
    return images & _beside(images, dali.fn.cast(parameter, dtype=dali.types.UINT8))


def _solarize(dali: Any, images: Any, matrix: Any, parameter: Any, grey: bool) -> Any:
    bright = images >= _beside(images, parameter)
    white = dali.types.Constant(255, dtype=dali.types.UINT8)
    return bright * (white - images) + (bright ^ True) * images


def _autocontrast(dali: Any, images: Any, matrix: Any, parameter: Any, grey: bool) -> Any:
    fn, kinds = dali.fn, dali.types
    low = fn.cast(fn.reductions.min(images, axes=(0, 1), keep_dims=True), dtype=kinds.FLOAT)
    high = fn.cast(fn.reductions.max(images, axes=(0, 1), keep_dims=True), dtype=kinds.FLOAT)
    differ = high > low  # a channel of one shade stays
    span = (high - low) * (1 / 255) * differ + (differ ^ True)
    return _whole(dali, (images - low * differ) / span)


def _equalize(dali: Any, images: Any, matrix: Any, parameter: Any, grey: bool) -> Any:
    """torchvision's and Pillow's count how many pixels are darker than a shade, OpenCV's and DALI's how many
    are not brighter: of the negative, the one is the other. Pillow divides by a rounded number of pixels."""
    fn, math, kinds = dali.fn, dali.math, dali.types
    white = kinds.Constant(255, dtype=kinds.UINT8)
    brightest = fn.reductions.max(images, axes=(0, 1), keep_dims=True)
    others = fn.cast(images < brightest, dtype=kinds.FLOAT)
    others = fn.reductions.sum(others, axes=(0, 1), keep_dims=True)
    darker = math.floor((255 - fn.equalize(white - images)) * others * (1 / 255) + 0.5)
    step = math.floor(others / 255)
    shades = _whole(dali, (darker + math.floor(step * 0.5)) / math.max(step, 1.0))
    enough = step > 0  # else the image is as good as of one shade, and stays
    return enough * shades + (enough ^ True) * images


_FUNCTIONS = [globals()[f"_{name.lower()}"] for name in _BRANCHES]


def _beside(images: Any, parameter: Any) -> Any:
    """The parameter where the images are: arithmetic is done in one place."""
    return parameter.gpu() if images.device == "gpu" else parameter


def _grey(dali: Any, images: Any) -> Any:
    red, green, blue = images[:, :, 0:1], images[:, :, 1:2], images[:, :, 2:3]
    return dali.math.floor(red * 0.2989 + green * 0.587 + blue * 0.114)


def _blend(dali: Any, images: Any, others: Any, parameter: Any) -> Any:
    share = _beside(images, parameter)
    return _whole(dali, images * share + others * (1 - share))


def _whole(dali: Any, numbers: Any) -> Any:
    """uint8 as torch makes it of numbers: what is behind the point is cut off."""
    return dali.fn.cast(dali.math.floor(dali.math.clamp(numbers, 0, 255)), dtype=dali.types.UINT8)
