"""Folders of image files: which files a split holds, and the class of each.

    ROOT/train/<class>/*.JPEG                 classes numbered from 0 in sorted order of their names
    ROOT/val/<class>/*.JPEG                   or all files in ROOT/val without classes, with a label file

Files may lie in further folders within these, ROOT/train/<class>/<folder>/*.JPEG: which files are found, and
their order, are those of torchvision's ImageFolder. A label file for a `val` without class folders is looked
for in ROOT, ROOT/val, and where the distributed archives have it:

    val.txt, val_labels.txt, ...              lines "FILE CLASS", the class by name or by number
    LOC_val_solution.csv                      "ImageId,PredictionString" lines, as Kaggle distributes them
    ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt with meta.mat beside it (needs scipy)

FILE is a path in ROOT/val, or just a file's name where only one file has it; suffixes do not matter. Where
there is no `val`: data.images.share.
"""

from __future__ import annotations

import csv
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.datasets.idx import Split
from data.images.layout import HERE, TRAIN, is_folder, meant_by, subfolders

EXTENSIONS = (".jpeg", ".jpg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm")
NOT_READ = (  # images, too, and counted
    *(".gif", ".jp2", ".j2k", ".jpx", ".jfif", ".jpe", ".avif", ".heic", ".heif", ".jxl", ".pgm", ".pbm"),
    *(".tga", ".psd", ".svg", ".ico", ".pcx", ".exr", ".hdr", ".dng", ".cr2", ".nef", ".arw", ".raw"),
)
FOLDERS = {"train": "train", "test": "val"}
LABEL_FILES = ("val.txt", "val_labels.txt", "validation_labels.txt", "val_map.txt", "LOC_val_solution.csv")
DEVKIT = Path("ILSVRC2012_devkit_t12", "data")
GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
EXCLUSIONS = "excluded.txt"  # in ROOT; `acdc verify-data` writes it, loading honours it


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """files: paths relative to `root`, with forward slashes, as `load_image_files` sorts them. labels: int64,
    (N,), numbers of `classes`. num_excluded: how many files an exclusion list left out, or names among those
    that stayed. excluded: the numbers of the latter. left_out: how many image files there are of each format
    that is not read, by suffix."""

    root: Path
    files: tuple[str, ...]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    num_excluded: int = 0
    excluded: frozenset[int] = frozenset()
    left_out: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.files)

    def path(self, number: int) -> Path:
        return self.root / self.files[number]

    def take(self, numbers: NDArray[np.int64]) -> ImageFiles:
        """The files of these numbers, in their order."""
        names = tuple(self.files[number] for number in numbers.tolist())
        excluded = frozenset(i for i, number in enumerate(numbers.tolist()) if number in self.excluded)
        labels = self.labels[numbers]
        return replace(self, files=names, labels=labels, num_excluded=len(excluded), excluded=excluded)

    def without_excluded(self) -> ImageFiles:
        kept = [number for number in range(len(self)) if number not in self.excluded]
        return replace(self.take(np.array(kept, np.int64)), num_excluded=self.num_excluded)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over names and labels; the files' content is not read."""
        digest = hashlib.sha256(os.fsencode("\n".join(self.files)))
        digest.update(np.ascontiguousarray(self.labels).data)
        return digest.hexdigest()


def load_image_files(
    root: Path,
    split: Split,
    label_file: Path | None = None,
    keep_excluded: bool = False,
    training: str = TRAIN,
) -> ImageFiles:
    """The files of one split of `root`, without those that ROOT/excluded.txt names.

    Sorted by class, by folder within it, by name within that. label_file: for a `val` without class folders;
    else it is looked for, see above. keep_excluded: leave those files in and say which they are: excluding
    one then moves no other in a shuffled order. training: the folder in `root` that holds training's class
    folders, "." for `root` itself. Raises FileNotFoundError where a folder or the label file is missing,
    ValueError for labels that do not fit the files or the training classes."""
    place = training if split == "train" else FOLDERS[split]
    folder = root / place
    if not folder.is_dir():
        meant = meant_by(root)
        hint = f"; did you mean data.root={meant}?" if meant else ""
        if split == "test" and (root / TRAIN).is_dir():
            hint = "; data.val_share=0.2 splits validation images off the training ones"
        raise FileNotFoundError(
            f"no folder {folder}: expected are {root}/train/CLASS/*.JPEG and {root}/val{hint}"
        )
    classes, named = subfolders(root / training), subfolders(folder)
    if split == "train" and not named:
        raise FileNotFoundError(f"{folder} holds no class folders: expected are {folder}/CLASS/*.JPEG")
    left_out: Counter[str] = Counter()
    found = find_images(root, place, left_out=left_out)
    if place == HERE:  # what else lies in ROOT is no class
        found = [(here, files) for here, files in found if not here.startswith((HERE, "__MACOSX"))]
        classes = named = sorted({here.split("/")[0] for here, files in found if files})
        found = [(here, files) for here, files in found if here.split("/")[0] in classes]
    if set(named) & set(classes) or (named and not classes and label_file is None):
        classes = classes or named
        numbers = {name: number for number, name in enumerate(classes)}
        if unknown := [name for name in named if name not in numbers]:
            raise ValueError(f"{folder} has classes that training does not have: {_few(unknown)}")
        depth = 0 if place == HERE else 1
        by_class = sorted((here.split("/")[depth], here, files) for here, files in found if here != place)
        pairs = [(f"{here}/{file}", numbers[name]) for name, here, files in by_class for file in files]
    else:
        label_file = label_file or _find_label_file(root)
        if label_file is None and named:
            raise ValueError(
                f"{folder} has classes that training does not have: {_few(named)}; if these are "
                "not classes, give data.val_labels=FILE"
            )
        inside = [f"{here}/{file}".partition("/")[2] for here, files in found for file in files]
        labels = _labels_of(inside, _read_labels(root, label_file, classes), folder)
        pairs = [(f"{folder.name}/{file}", label) for file, label in zip(inside, labels, strict=True)]
    excluded = read_exclusions(root / EXCLUSIONS)
    numbers_of_excluded = frozenset(i for i, (file, _) in enumerate(pairs) if file in excluded)
    if len(numbers_of_excluded) == len(pairs):
        only = f"; there are {count_of(left_out)}, which are not read" if left_out else ""
        raise FileNotFoundError(f"{folder} holds no images ({', '.join(EXTENSIONS)}){only}")
    names, all_labels = zip(*pairs, strict=True)
    counts = len(numbers_of_excluded), numbers_of_excluded, dict(left_out)
    files = ImageFiles(root, names, np.asarray(all_labels, np.int64), tuple(classes), *counts)
    return files if keep_excluded or not files.excluded else files.without_excluded()


def find_images(
    root: Path,
    folder: str,
    on_error: Callable[[OSError], None] | None = None,
    left_out: Counter[str] | None = None,
) -> list[tuple[str, list[str]]]:
    """`folder` and all folders in it, relative to `root`, each with the names of the image files directly in
    it: both sorted.

    Links to folders are followed, but none back to a folder that it lies in, which would never end. on_error:
    called for a folder that cannot be listed; without it the error is raised. left_out: counts image files of
    formats that are not read, by suffix."""
    found = []
    waiting = [(folder, [os.path.realpath(root / folder)])]  # with the real paths from the first folder on
    while waiting:
        here, above = waiting.pop()
        try:
            entries = list(os.scandir(root / here))
        except OSError as error:
            if on_error is None:
                raise
            on_error(error)
            continue
        images = []
        for entry in entries:  # no call to the system for each: the listing tells files from folders
            if is_folder(entry):
                linked = entry.is_symlink()
                real = os.path.realpath(entry.path) if linked else f"{above[-1]}/{entry.name}"
                if not linked or not any(os.path.commonpath((real, path)) == real for path in above):
                    inner = entry.name if here == HERE else f"{here}/{entry.name}"
                    waiting.append((inner, [*above, real]))
            elif entry.name.lower().endswith(EXTENSIONS):
                images.append(entry.name)
            elif left_out is not None and entry.name.lower().endswith(NOT_READ):
                left_out[os.path.splitext(entry.name)[1].lower()] += 1
        found.append((here, sorted(images)))
    return sorted(found)


def read_exclusions(path: Path) -> frozenset[str]:
    """Files to leave out: one path relative to ROOT a line, as in ImageFiles.files; what follows a tab is a
    reason, and lines that begin with # are comments. A missing list excludes nothing."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return frozenset()
    return frozenset(line.partition("\t")[0] for line in lines if line and not line.startswith("#"))


def has_images(folder: Path) -> bool:
    """Whether an image that is read lies directly in it."""
    return any(name.lower().endswith(EXTENSIONS) for name in os.listdir(folder))


def count_of(left_out: Mapping[str, int]) -> str:
    """ "4 .gif, 2 .jp2", for people."""
    return ", ".join(f"{count:,} {suffix}" for suffix, count in sorted(left_out.items()))


def _find_label_file(root: Path) -> Path | None:
    candidates = [folder / name for folder in (root, root / "val") for name in LABEL_FILES]
    return next((path for path in [*candidates, root / DEVKIT / GROUND_TRUTH] if path.is_file()), None)


def _labels_of(files: list[str], labels: dict[str, int], folder: Path) -> list[int]:
    """The label of each file, a path in `folder`: the one that `labels` has for this path, else for the name
    alone. Raises ValueError for files that have none, or for whose name there are several."""
    keys = {file: os.path.splitext(file)[0] for file in files}
    by_name: dict[str, set[int]] = {}  # labels of what is not a file's path
    for key in labels.keys() - keys.values():
        by_name.setdefault(_name(key), set()).add(labels[key])
    rest = {file: _name(key) for file, key in keys.items() if key not in labels}
    if missing := [file for file, name in rest.items() if name not in by_name]:
        raise ValueError(f"{folder}: {len(missing)} of {len(files)} files have no label: {_few(missing)}")
    num_alike = Counter(_name(key) for key in {keys[file] for file in rest})
    if unclear := [file for file, name in rest.items() if num_alike[name] > 1 or len(by_name[name]) > 1]:
        raise ValueError(
            f"{folder}: the label file does not tell apart {_few(unclear)}, whose names are not unique: "
            f"it has to name them by their paths in {folder}"
        )
    return [min(by_name[rest[file]]) if file in rest else labels[keys[file]] for file in files]


def _name(key: str) -> str:
    return key.rpartition("/")[2]


def _read_labels(root: Path, label_file: Path | None, classes: list[str]) -> dict[str, int]:
    """Path in `val`, or file name alone, without suffix -> class number."""
    if label_file is None:
        known = f"{', '.join(LABEL_FILES)} or {DEVKIT / GROUND_TRUTH}"
        raise FileNotFoundError(
            f"{root / 'val'} has no class folders, and no label file is beside it: give "
            f"data.val_labels=FILE, or put one of {known} into {root}"
        )
    if not label_file.is_file():
        raise FileNotFoundError(f"no label file {label_file}")
    if label_file.name == GROUND_TRUTH:
        rows: Iterable[tuple[str, str]] = _devkit_rows(label_file)
    elif label_file.suffix == ".csv":
        rows = _kaggle_rows(label_file)
    else:
        rows = _plain_rows(label_file)
    numbers = {name: number for number, name in enumerate(classes)}
    labels: dict[str, int] = {}
    for file, label in rows:
        number = numbers.get(label, int(label) if label.isdecimal() else -1)
        if number < 0 or (classes and number >= len(classes)):
            raise ValueError(
                f"{label_file}: {file} has class {label!r}, which is none of the training classes"
            )
        key = os.path.splitext(file.removeprefix("./").lstrip("/").removeprefix("val/"))[0]
        if labels.setdefault(key, number) != number:
            raise ValueError(f"{label_file}: {file} is named twice, with two classes")
    return labels


def _plain_rows(path: Path) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        words = line.split()
        if not words:
            continue
        if len(words) != 2:
            raise ValueError(f"{path}, line {number}: {line[:60]!r} is not FILE CLASS")
        yield words[0], words[1]


def _kaggle_rows(path: Path) -> Iterator[tuple[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if not row.get("ImageId") or not (row.get("PredictionString") or "").split():
                raise ValueError(f"{path}: {row} has no ImageId or no PredictionString")
            yield row["ImageId"], row["PredictionString"].split()[0]


def _devkit_rows(path: Path) -> Iterator[tuple[str, str]]:
    """Line i is the number, from 1, of validation image i's class in meta.mat, which is not sorted."""
    try:
        from scipy.io import loadmat
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{path.with_name('meta.mat')} needs scipy to be read: pip install scipy"
        ) from error
    synsets = loadmat(path.with_name("meta.mat"), squeeze_me=True)["synsets"]
    names = {int(synset["ILSVRC2012_ID"]): str(synset["WNID"]) for synset in synsets}
    for number, line in enumerate(path.read_text(encoding="utf-8").split(), 1):
        if int(line) not in names:
            raise ValueError(f"{path}, line {number}: class {line} is not in meta.mat")
        yield f"ILSVRC2012_val_{number:08}.JPEG", names[int(line)]


def _few(names: Collection[str]) -> str:
    shown = sorted(names)[:3]
    return ", ".join(shown) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
