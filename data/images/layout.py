"""Where in a folder the class folders are, and what a folder that is one level off was meant to be.

ROOT/train/CLASS/*.jpg, ROOT/val/CLASS/*.jpg      the layout
ROOT/train/CLASS/*.jpg                            without validation images
ROOT/CLASS/*.jpg                                  without either: ROOT itself is the training folder
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

HERE = "."
TRAIN, VAL = "train", "val"
_OTHER_NAMES = {"train": TRAIN, "training": TRAIN, "val": VAL, "valid": VAL, "validation": VAL}


def class_root(root: Path, has_images: Callable[[Path], bool]) -> str:
    """The folder that holds training's class folders, relative to `root`: "train", or "." for itself.

    has_images: whether images lie directly in a folder. Raises FileNotFoundError, with the folder that was
    meant or with what to rename, where neither is one.
    """
    folders = subfolders(root)
    has_train = any(_OTHER_NAMES.get(name.lower()) == TRAIN for name in folders)  # else they may be classes
    for name in folders if has_train else ():
        right = _OTHER_NAMES.get(name.lower(), name)
        if right != name and right not in folders:
            raise FileNotFoundError(
                f"{root} has a folder {name}, which has to be named {right}: mv {root / name} {root / right}"
            )
    if TRAIN in folders:
        return TRAIN
    if VAL in folders:
        raise FileNotFoundError(
            f"{root} has {VAL}, but no {TRAIN}: training images belong into {root / TRAIN}"
        )
    if meant := meant_by(root):
        raise FileNotFoundError(f"{root} is one level off: did you mean data.root={meant}?")
    classes = [name for name in folders if _anywhere(root / name, has_images)]
    if len(classes) > 1:
        return HERE
    if classes and not has_images(root / classes[0]):
        within = root / classes[0]
        if sum(_anywhere(within / name, has_images) for name in subfolders(within)) > 1:
            raise FileNotFoundError(f"{root} is one level off: did you mean data.root={within}?")
    if not classes and has_images(root):
        above = root.resolve().parent
        if sum(has_images(above / name) for name in subfolders(above)) > 1:
            raise FileNotFoundError(f"{root} is one class's folder: did you mean data.root={above}?")
    found = f"one, {classes[0]}" if classes else "none"
    raise FileNotFoundError(
        f"{root} has to hold two or more class folders, {root}/CLASS/*.jpg, or {root}/{TRAIN}/CLASS/*.jpg; "
        f"of folders with images there is {found}"
    )


def meant_by(root: Path) -> Path | None:
    """The folder with `train` in it that is one level above or below, where `root` has none."""
    above = root.resolve().parent
    if root.resolve().name in (TRAIN, VAL) and (above / TRAIN).is_dir():
        return above
    return next((root / name for name in subfolders(root) if (root / name / TRAIN).is_dir()), None)


def subfolders(folder: Path) -> list[str]:
    """Sorted; none of a folder that is not there."""
    if not folder.is_dir():
        return []
    return sorted(entry.name for entry in os.scandir(folder) if is_folder(entry))


def is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _anywhere(folder: Path, has_images: Callable[[Path], bool]) -> bool:
    return has_images(folder) or any(_anywhere(folder / name, has_images) for name in subfolders(folder))
