"""Trees of JPEGs cut from the real photographs that scikit-image carries, of odd sizes."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

skimage = pytest.importorskip("skimage", reason="scikit-image, which carries photographs, is not installed")
PHOTOGRAPHS = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "motorcycle_left.png",
    "rocket.jpg",
    "retina.jpg",
    "hubble_deep_field.jpg",
    "camera.png",
    "coins.png",
    "brick.png",
    "grass.png",
)


@lru_cache(maxsize=len(PHOTOGRAPHS))
def _whole(name: str) -> Image.Image:
    with Image.open(Path(skimage.__file__).parent / "data" / name) as image:
        return image.convert("RGB")


def photograph(number: int, width: int, height: int) -> Image.Image:
    """A part of one of the photographs, another one for every number, resized to width x height."""
    whole = _whole(PHOTOGRAPHS[number % len(PHOTOGRAPHS)])
    random = np.random.default_rng(number)
    share = random.uniform(0.5, 1)
    w, h = int(whole.width * share), int(whole.height * share)
    left, top = int(random.integers(0, whole.width - w + 1)), int(random.integers(0, whole.height - h + 1))
    return whole.resize((width, height), Image.Resampling.BICUBIC, (left, top, left + w, top + h))


def odd_size(number: int, around: int) -> tuple[int, int]:
    random = np.random.default_rng((number, 1))
    width, height = random.integers(around * 2 // 3, around * 3 // 2, 2)
    return int(width), int(height)


def make_tree(root: Path, num_classes: int, per_class: int, per_class_val: int = 2, around: int = 90) -> Path:
    """ROOT/train and ROOT/val with class folders. Among the files are progressive, greyscale and CMYK JPEGs,
    a PNG that is named JPEG, and one with an EXIF orientation."""
    number = 0
    for split, count in (("train", per_class), ("val", per_class_val)):
        for c in range(num_classes):
            folder = root / split / f"n{c:08}"
            folder.mkdir(parents=True)
            for i in range(count):
                image = photograph(number, *odd_size(number, around))
                kind = number % 16
                options = {"quality": 90}
                if kind == 3:
                    options["progressive"] = True
                elif kind == 5:
                    image = image.convert("L")
                elif kind == 7:
                    image = image.convert("CMYK")
                elif kind == 11:
                    exif = Image.Exif()
                    exif[0x0112] = 6  # to be shown turned; training and evaluation take images as stored
                    options["exif"] = exif
                image.save(folder / f"{i:06}.JPEG", "PNG" if kind == 9 else "JPEG", **options)
                number += 1
    return root
