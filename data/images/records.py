"""Images packed into large files that are read in sequence: WebDataset tars, TFRecord, RecordIO.

ROOT/train/*.tar        *.idx    WebDataset, of `acdc prepare shards`; for others, DALI's wds2idx
ROOT/train/*tfrecord*   *.idx    TFRecord; DALI's tfrecord2idx makes the index files
ROOT/train/*.rec        *.idx    RecordIO, as MXNet's im2rec writes it, with its index files
ROOT/val/...                     likewise
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from data.datasets.idx import Split
from data.images.files import FOLDERS
from data.images.shards import MANIFEST, open_shards

# format -> (pattern of its files, the tool that makes their indices)
FORMATS = {
    "webdataset": ("*.tar", "wds2idx"),
    "tfrecord": ("*tfrecord*", "tfrecord2idx"),
    "recordio": ("*.rec", "im2rec.py"),
}


@dataclass(frozen=True)
class RecordFiles:
    """paths, indices: a file and its index each. num_classes: None where the files do not tell. digest:
    SHA-256 over a manifest where there is one, else over names and sizes."""

    format: str
    paths: tuple[Path, ...]
    indices: tuple[Path, ...]
    num_classes: int | None
    digest: str


def find_records(root: Path, split: Split, kind: str) -> RecordFiles:
    """The files of one split. Raises FileNotFoundError for a folder without such files, or a file without its
    index, and ValueError for a damaged manifest, saying what to do."""
    folder = root / FOLDERS[split]
    pattern, tool = FORMATS[kind]
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no folder {folder}: expected are {root}/train/{pattern} and {root}/val/{pattern}"
        )
    if kind == "webdataset" and (folder / MANIFEST).exists():
        shards = open_shards(folder)
        return RecordFiles(kind, shards.tars, shards.indices, len(shards.classes), shards.digest)
    paths = sorted(path for path in folder.glob(pattern) if path.suffix != ".idx")
    if not paths:
        raise FileNotFoundError(f"{folder} holds no {pattern}: is data.format={kind} right?")
    indices = [_index(path) for path in paths]
    if missing := [str(index) for index in indices if not index.is_file()]:
        raise FileNotFoundError(
            f"{len(missing)} index files are missing, {missing[0]} first; {tool} makes them"
        )
    sizes = [f"{path.name} {path.stat().st_size}" for path in (*paths, *indices)]
    digest = hashlib.sha256("\n".join(sizes).encode()).hexdigest()
    return RecordFiles(kind, tuple(paths), tuple(indices), None, digest)


def _index(path: Path) -> Path:
    """TFRecord files have endings such as -00000-of-01024, to which the index's is added."""
    return path.with_suffix(".idx") if path.suffix in (".tar", ".rec") else Path(f"{path}.idx")
