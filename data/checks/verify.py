"""Look at every image file of a data set: decode it, and compare it with a manifest of checksums.

    find the files -> processes, each examining one file after another -> problems -> ROOT/excluded.txt

A file that brings down the decoder, and the process with it, is reported like any other problem.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import ImageFile

from data.atomic import write_text
from data.checks.damage import diagnose
from data.checks.processes import Died, apply
from data.images.files import EXTENSIONS, FOLDERS, find_images, has_images
from data.images.layout import HERE, subfolders

BAD = ("empty", "truncated", "garbage", "changed", "unreadable")
WARNINGS = ("wrong name", "cmyk")
_HEADER = "# Files that training and evaluation leave out; delete a line to have its file back."
_MANIFEST_LINE = re.compile(r"(?P<digest>[0-9a-fA-F]{64}) [ *](?:\./)?(?P<file>.+)")

Progress = Callable[[int, int], None]  # files done, files in all
Item = tuple[str, str | None]  # file, its SHA-256 where that is known


@dataclass(frozen=True, order=True)
class Problem:
    """file: relative to ROOT, with forward slashes. detail: for people.

    kind: one of BAD (it cannot be used, or is not what it was), of WARNINGS (it decodes), or "missing" (the
    manifest names it, but it is not there).
    """

    file: str
    kind: str
    detail: str

    @property
    def bad(self) -> bool:
        """Not to be trained on, hence excluded. Of a missing file there is nothing to exclude."""
        return self.kind in BAD

    @property
    def warning(self) -> bool:
        """Worth knowing, but the file decodes: decoders go by the content, not by the name."""
        return self.kind in WARNINGS


def verify(
    root: Path, *, manifest: Mapping[str, str] | None, workers: int, on_progress: Progress
) -> list[Problem]:
    """Examine all image files below ROOT/train and ROOT/val, those that the exclusion list names among them,
    and what else `manifest` (relative path -> SHA-256 in hexadecimal) names. Files that it does not name are
    decoded only.

    Returns one problem a file, the one that says most, sorted by file. workers: number of processes.
    on_progress: called with the files done and the files in all, at the start and after each file. Raises
    FileNotFoundError where ROOT holds no images, ValueError where none of them is in the manifest.
    """
    found, problems = _find(root)
    known = manifest or {}
    if manifest is not None and not known.keys() & set(found):
        raise ValueError(
            f"the manifest names none of the {len(found)} images in {root}: is it of another folder?"
        )
    items = [(file, known.get(file)) for file in sorted({*found, *known})]
    for (file, _), result in apply(_examine, root, items, workers, on_progress):
        if isinstance(result, Died):
            result = Problem(file, "garbage", f"the process that decodes it ends with {result.how}")
        if result is not None:
            problems.append(result)
    return sorted(problems)


def make_manifest(root: Path, workers: int, on_progress: Progress) -> dict[str, str]:
    """SHA-256 in hexadecimal of all image files below ROOT/train and ROOT/val, by relative path, sorted.

    Arguments as for `verify`, which is to be run before: nothing is decoded here. Raises OSError for a file
    that cannot be read.
    """
    found, problems = _find(root)
    digests, items = {}, [(file, None) for file in found]
    for (file, _), result in apply(_digest, root, items, workers, on_progress):
        if isinstance(result, str):
            digests[file] = result
        else:
            problems.append(Problem(file, "unreadable", result.how) if isinstance(result, Died) else result)
    if problems:
        first = min(problems)
        raise OSError(
            f"{root / first.file}: {first.detail}; {len(problems)} such in all. A manifest needs every file: "
            f"repair or remove them first"
        )
    return dict(sorted(digests.items()))


def write_manifest(path: Path, manifest: Mapping[str, str]) -> None:
    """Write what `sha256sum --check` reads in ROOT. Raises ValueError for a name that no line can hold."""
    for file in manifest:
        _check_name(file)
    write_text(path, "".join(f"{manifest[file]}  {file}\n" for file in sorted(manifest)))


def read_manifest(path: Path) -> dict[str, str]:
    """Relative path -> SHA-256 in hexadecimal, from lines as `sha256sum` writes them in ROOT.

    Raises OSError where the file cannot be read, ValueError naming the line that is not "SHA256  PATH".
    """
    manifest: dict[str, str] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        text = line.decode("utf-8", errors="backslashreplace")
        match = _MANIFEST_LINE.fullmatch(text)
        if match is None or "\\" in text:
            raise ValueError(
                f"{path}, line {number}: {text[:90]!r} is not SHA256 and PATH with two spaces between"
            )
        file, digest = match["file"], match["digest"].lower()
        if file.startswith("/") or ".." in file.split("/"):
            raise ValueError(f"{path}, line {number}: {file} is not relative to ROOT: run sha256sum in ROOT")
        if manifest.setdefault(file, digest) != digest:
            raise ValueError(f"{path}, line {number}: {file} is named before, with another checksum")
    if not manifest:
        raise ValueError(f"{path}, line 1: a manifest without lines; acdc verify-data can write one")
    return manifest


def write_exclusions(path: Path, problems: Iterable[Problem]) -> None:
    """Add the bad ones of `problems` to the exclusion list that data.images.files.read_exclusions reads.

    Lines and comments that the list holds are kept, but a file that is bad now gets its new reason; comments
    come first, then the lines by file. Nothing is written where nothing is bad. Raises ValueError for a name
    that no line can hold.
    """
    added = {problem.file: f"{problem.kind}: {problem.detail}" for problem in problems if problem.bad}
    if not added:
        return
    for file in added:
        _check_name(file)
    former = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    comments = [line for line in former if line.startswith("#") and line != _HEADER]
    lines = {line.partition("\t")[0]: line for line in former if line.strip() and not line.startswith("#")}
    for file, reason in added.items():
        lines[file] = f"{file}\t{' '.join(reason.split())}"
    write_text(path, "\n".join([_HEADER, *comments, *(lines[file] for file in sorted(lines))]) + "\n")


def _find(root: Path) -> tuple[list[str], list[Problem]]:
    """Image files below the splits' folders, sorted, and the folders that cannot be listed."""
    folders = [name for name in FOLDERS.values() if (root / name).is_dir()]
    if not folders and len([name for name in subfolders(root) if has_images(root / name)]) > 1:
        folders = [HERE]  # class folders without further order
    if not folders:
        raise FileNotFoundError(
            f"{root} holds neither train nor val: expected are {root}/train/CLASS/*.JPEG and {root}/val"
        )
    failures: list[OSError] = []
    found = [here for folder in folders for here in find_images(root, folder, failures.append)]
    files = [f"{here}/{name}".removeprefix(f"{HERE}/") for here, names in found for name in names]
    if not files and not failures:
        raise FileNotFoundError(f"no images ({', '.join(EXTENSIONS)}) below {root}/train or {root}/val")
    return sorted(files), [
        Problem(Path(error.filename).relative_to(root).as_posix(), "unreadable", str(error.strerror))
        for error in failures
    ]


def _examine(root: Path, item: Item) -> Problem | None:
    """What is wrong with one file; only images are decoded. Runs in a process of its own."""
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    file, expected = item
    content = _read(root, item)
    if isinstance(content, Problem):
        return content
    finding = diagnose(content, file) if file.lower().endswith(EXTENSIONS) else None
    problem = Problem(file, *finding) if finding else None
    if expected is None or (problem and problem.bad) or hashlib.sha256(content).hexdigest() == expected:
        return problem
    also = f"; besides, {problem.detail}" if problem else ""
    return Problem(file, "changed", f"its SHA-256 is not the manifest's{also}")


def _digest(root: Path, item: Item) -> str | Problem:
    content = _read(root, item)
    return content if isinstance(content, Problem) else hashlib.sha256(content).hexdigest()


def _read(root: Path, item: Item) -> bytes | Problem:
    file, expected = item
    path = root / file
    try:
        if path.is_file():  # opening a pipe would wait for ever
            return path.read_bytes()
        if expected is not None and not os.path.lexists(path):
            return Problem(file, "missing", "the manifest names it, but it is not there")
        return Problem(file, "unreadable", "no file, but a link to nowhere, a folder or a device")
    except (OSError, ValueError) as error:  # ValueError: a manifest may name what no file system can
        return Problem(file, "unreadable", getattr(error, "strerror", None) or str(error))


def _check_name(file: str) -> None:
    """Raises ValueError for a file name that a line of a list cannot hold."""
    if not file.isprintable() or "\\" in file or file.startswith("#"):
        raise ValueError(f"{file!r} cannot be written into a list of files: rename it")
