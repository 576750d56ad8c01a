"""RandAugment and TrivialAugment: draws that do not know the image yet, and what they do to it.

The laws are those of torchvision's RandAugment (Cubuk et al. 2019) and TrivialAugmentWide (Mueller and Hutter
2021): the same operations, 31 bins of strength, signs, the nearest pixel, black outside of the image.
data.dali.augment computes the same on a GPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.torchvision_import import import_transforms

BINS = 31
# in torchvision's order; the nine after Identity go both ways
OPERATIONS = (
    *("Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"),
    *("Brightness", "Color", "Contrast", "Sharpness"),
    *("Posterize", "Solarize", "AutoContrast", "Equalize"),
)
_BOTH_WAYS = range(1, OPERATIONS.index("Posterize"))


@dataclass(frozen=True)
class Augment:
    """law: "trivial" draws one operation and its bin for each image; "rand" draws num_ops operations, one
    after the other, all of bin `magnitude`, in 0 .. 30."""

    law: Literal["trivial", "rand"]
    num_ops: int = 1
    magnitude: int = 0

    def draw(self, random: np.random.Generator, count: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """(operations, levels) of `count` images, (count, num_ops): numbers in OPERATIONS; bins with a sign,
        which only operations that go both ways heed."""
        shape = (count, self.num_ops)
        operations = random.integers(0, len(OPERATIONS), shape, dtype=np.int32)
        bins = random.integers(0, BINS, shape, dtype=np.int32)
        signs = random.integers(0, 1, shape, dtype=np.int32, endpoint=True) * 2 - 1
        return operations, signs * (bins if self.law == "trivial" else np.int32(self.magnitude))

    def magnitudes(
        self, operations: NDArray[np.int32], levels: NDArray[np.int32], height: int, width: int
    ) -> NDArray[np.float32]:
        """What a draw means for images of that size, as `apply` takes it; the same shape."""
        table = _table(self.law, height, width)
        signs = np.where(np.isin(operations, _BOTH_WAYS), np.sign(levels), 1)
        return table[operations, np.abs(levels)] * signs.astype(np.float32)


@lru_cache(maxsize=8)  # progressive resizing has a few sizes
def _table(law: str, height: int, width: int) -> NDArray[np.float32]:
    """(operations, BINS): torchvision's magnitudes. Slopes, pixels, degrees, differences from a factor of 1,
    bits kept, the threshold as a share of white."""
    wide = law == "trivial"
    shear, angle, factor, bits = (0.99, 135.0, 0.99, 6) if wide else (0.3, 30.0, 0.9, 4)
    right, down = (32.0, 32.0) if wide else (150.0 / 331.0 * width, 150.0 / 331.0 * height)
    # torch's linspace: numpy's rounds otherwise
    ends = {"ShearX": shear, "ShearY": shear, "TranslateX": right, "TranslateY": down, "Rotate": angle}
    ends |= dict.fromkeys(("Brightness", "Color", "Contrast", "Sharpness"), factor)
    rows = {name: torch.linspace(0.0, end, BINS) for name, end in ends.items()}
    rows["Posterize"] = (8 - torch.arange(BINS) / ((BINS - 1) / bits)).round()
    rows["Solarize"] = torch.linspace(1.0, 0.0, BINS)
    none = torch.zeros(BINS)
    return torch.stack([rows.get(name, none) for name in OPERATIONS]).numpy()


def apply(image: Tensor, operations: NDArray[np.int32], magnitudes: NDArray[np.float32]) -> Tensor:
    """One image, uint8, (1 or 3, height, width), after its (num_ops,) operations, by torchvision."""
    for operation, magnitude in zip(operations.tolist(), magnitudes.tolist(), strict=True):
        image = _apply(import_transforms().functional, image, OPERATIONS[operation], magnitude)
    return image


def apply_to_batch(images: Tensor, operations: NDArray[np.int32], magnitudes: NDArray[np.float32]) -> Tensor:
    """`apply` for each image of a batch, (N, channels, height, width), written over it."""
    for image, *drawn in zip(images, operations, magnitudes, strict=True):
        image.copy_(apply(image, *drawn))
    return images


def _apply(functional: Any, image: Tensor, operation: str, magnitude: float) -> Tensor:
    match operation:
        case "ShearX":
            return _affine(functional, image, shear=[_degrees(magnitude), 0.0], center=[0, 0])
        case "ShearY":
            return _affine(functional, image, shear=[0.0, _degrees(magnitude)], center=[0, 0])
        case "TranslateX":
            return _affine(functional, image, translate=[int(magnitude), 0])
        case "TranslateY":
            return _affine(functional, image, translate=[0, int(magnitude)])
        case "Rotate":
            return functional.rotate(image, magnitude)
        case "Brightness":
            return functional.adjust_brightness(image, 1.0 + magnitude)
        case "Color":
            return functional.adjust_saturation(image, 1.0 + magnitude)
        case "Contrast":
            return functional.adjust_contrast(image, 1.0 + magnitude)
        case "Sharpness":
            return functional.adjust_sharpness(image, 1.0 + magnitude)
        case "Posterize":
            return functional.posterize(image, int(magnitude))
        case "Solarize":
            return functional.solarize(image, 255.0 * magnitude)
        case "AutoContrast":
            return functional.autocontrast(image)
        case "Equalize":
            return functional.equalize(image)
    return image


def _affine(functional: Any, image: Tensor, **changes: Any) -> Tensor:
    still = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0]}
    return functional.affine(image, **{**still, **changes})


def _degrees(slope: float) -> float:
    return math.degrees(math.atan(slope))
