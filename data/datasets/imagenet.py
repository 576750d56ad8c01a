"""ImageNet's constants, and where it lies when no path is given."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from data.places import data_home

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NUM_CLASSES = 1000
NUM_TRAIN = 1_281_167


def imagenet_root(root: Path | None) -> Path:
    """Raises FileNotFoundError, saying what is expected there, where that folder is missing."""
    path = root or data_home() / "imagenet"
    if root is not None and not path.is_dir():
        near = (
            difflib.get_close_matches(path.name, os.listdir(path.parent), n=1) if path.parent.is_dir() else []
        )
        hint = f"; did you mean data.root={path.parent / near[0]}?" if near else ""
        raise FileNotFoundError(f"no folder {path} for data.root{hint}")
    if not path.is_dir():
        raise FileNotFoundError(
            f"no ImageNet in {path}: name the folder with train/CLASS/*.JPEG and val in it, data.root=FOLDER"
        )
    return path
