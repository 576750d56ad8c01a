"""Files that appear whole or not at all, whenever the process or the machine ends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

PARTIAL = ".partial"  # how the name of a file ends while it is written; a killed process leaves it behind


@contextmanager
def whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, that appears as `path` once it is whole and on the disk, and else not at all.

    Raises OSError when the disk refuses; what was at `path` before is then still there."""
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a small file in UTF-8 at once: never half of it."""
    with whole(path) as file:
        file.write(text.encode())


def sync_folder(folder: Path) -> None:
    """Names in `folder` are on the disk from here on."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
