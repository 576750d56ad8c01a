"""Tar shards of one split of an image folder, for DALI's webdataset reader: few files, read from end to end.

    DST/plan.json          what the shards are made of; written first
    DST/shard-00000.tar    000000000.jpg, 000000000.cls, 000000001.jpg, ...; a .cls is the class, in decimal
    DST/shard-00000.idx    where in the tar each of them lies: DALI's index, format v1.2
    DST/shard-00000.tsv    "tar, bytes, SHA-256", then a line an image: "key, class, bytes, SHA-256, source"
    DST/manifest.json      the plan, and bytes and SHA-256 of every file above; written last

The same source, seed and shard size give the same bytes. A file gets its name once it is whole and on disk.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise, repeat
from pathlib import Path
from tarfile import BLOCKSIZE, RECORDSIZE, USTAR_FORMAT, TarInfo
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from data.atomic import PARTIAL, whole
from data.images.files import EXTENSIONS, ImageFiles
from data.parent import end_with_parent

FORMAT = 1
PLAN, MANIFEST = "plan.json", "manifest.json"
SHARD_BYTES = 256 * 10**6
Json = dict[str, Any]

# The reader's `ext` for an image of any kind and its class: .jpeg is stored as .jpg, all others as they are.
READER_EXTENSIONS = (";".join(extension[1:] for extension in EXTENSIONS if extension != ".jpeg"), "cls")


@dataclass(frozen=True)
class ShardSet:
    """What a folder of shards holds. tars, indices: a path of each a shard, in the order of the images' keys.
    digest: SHA-256 in hex over the plan and every file's SHA-256."""

    tars: tuple[Path, ...]
    indices: tuple[Path, ...]
    num_samples: int
    classes: tuple[str, ...]
    digest: str


class _Sample(NamedTuple):
    """An image to be stored. path: relative to the source. label: in decimal. size: in bytes."""

    key: str
    path: str
    label: str
    size: int

    @property
    def kind(self) -> str:
        return self.path.rpartition(".")[2].lower().replace("jpeg", "jpg")

    @property
    def span(self) -> int:
        """Bytes in a tar: header, image filled up to whole blocks, header, class."""
        return 3 * BLOCKSIZE + self.size + -self.size % BLOCKSIZE


def write_shards(
    files: ImageFiles,
    destination: Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    seed: int,
    workers: int,
    on_progress: Callable[[int, int], None],
) -> ShardSet:
    """Write `files`, in a random order drawn from `seed`, as tars of nearly equal size, `shard_bytes` at most
    give or take an image, by `workers` processes. on_progress: gets (images done, of all) after each tar.

    After an interruption call it again: shards that are there are checked byte for byte, and written anew
    unless they are whole. The source is compared by names, labels and sizes: a change of an image's content
    alone is not noticed, and does not reach a whole shard. One call at a time may write to a destination.

    Raises ValueError for a destination that holds anything else, as shards of another source, seed or size,
    and for a source file that is empty, unreadable or changing; OSError where the disk refuses, its subclass
    ChildProcessError where a worker was killed. Finished shards stay in all of these.
    """
    if shard_bytes < 1 or workers < 1:
        raise ValueError(f"shard_bytes={shard_bytes} and workers={workers} must both be at least 1")
    plan: Json = {"format": FORMAT, "seed": seed, "shard_bytes": shard_bytes, "images": len(files)}
    plan |= {"classes": list(files.classes), "names and labels": files.digest}
    destination.mkdir(parents=True, exist_ok=True)
    _refuse_other_plan(destination, plan)  # before a look at a million files
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker)
    try:
        sizes = list(pool.map(_size, repeat(files.root), files.files, chunksize=4096))
        plan["sizes of files"] = _sha256(_json(sizes))
        _refuse_other_plan(destination, plan)
        for left in destination.glob(f".*{PARTIAL}"):  # by a run that was killed
            left.unlink()
        _write(destination / PLAN, _json(plan))
        futures = [
            pool.submit(_make_shard, files.root, destination / f"shard-{number:05d}", samples)
            for number, samples in enumerate(_shards(files, sizes, seed, shard_bytes))
        ]
        done = 0
        for future in as_completed(futures):
            done += future.result()["images"]
            on_progress(done, len(files))
        content = plan | {"shards": [future.result() for future in futures]}
        _write(destination / MANIFEST, _json({"content": content, "sha256": _sha256(_json(content))}))
    except BrokenExecutor as error:
        advice = "start again, with fewer workers if memory was short; finished shards are kept"
        raise ChildProcessError(f"a process that wrote into {destination} was killed: {advice}") from error
    finally:
        pool.shutdown(cancel_futures=True)  # after an error, what runs is finished and what waits is dropped
    return open_shards(destination)


def open_shards(root: Path) -> ShardSet:
    """The shards in `root`: each tar and index is there and has its size. write_shards checks their content.

    Raises FileNotFoundError where the manifest or a shard is missing, ValueError where one is damaged.
    """
    manifest, again = root / MANIFEST, f"`acdc prepare shards SRC {root}`"
    try:
        read = json.loads(manifest.read_bytes())
        content, digest = read["content"], read["sha256"]
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{manifest} is missing: {again} writes what is not there yet") from error
    except (ValueError, KeyError, TypeError):
        content = digest = None
    if _sha256(_json(content)) != digest:
        raise ValueError(f"{manifest} is damaged: {again} checks the shards and writes it anew")
    if content["format"] != FORMAT:
        raise ValueError(f"{manifest} has format {content['format']}, not {FORMAT}: write the shards anew")
    shards = content["shards"]
    for entry in (shard[kind] for shard in shards for kind in ("tar", "idx")):
        path = root / entry["file"]
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing: copy it again, or {again} writes it anew")
        if (size := path.stat().st_size) != entry["bytes"]:
            raise ValueError(f"{path} has {size} bytes, not {entry['bytes']}: {again} writes it anew")
    tars, indices = (tuple(root / shard[kind]["file"] for shard in shards) for kind in ("tar", "idx"))
    return ShardSet(tars, indices, content["images"], tuple(content["classes"]), digest)


def _refuse_other_plan(destination: Path, plan: Json) -> None:
    """Raises ValueError where `destination` holds anything that this plan, or part of one, did not make."""
    try:
        found = json.loads((destination / PLAN).read_bytes())
        problems = [
            f"{key} is {found[key]}, not {value}" if isinstance(value, int) else f"other {key}"
            for key, value in plan.items()
            if found[key] != value
        ]
    except FileNotFoundError:
        problems = [f"{path.name} and no {PLAN}" for path in sorted(destination.glob("[!.]*"))[:1]]
    except (ValueError, KeyError, TypeError):
        problems = [f"a damaged {PLAN}"]
    if problems:
        what = f"{destination} is in use: {', '.join(problems)}"
        raise ValueError(f"{what}. Nothing was changed; give an empty folder")


def _size(root: Path, name: str) -> int:
    path = root / name
    try:
        if size := path.stat().st_size:
            return size
    except OSError as error:
        raise _bad_source(path, f"cannot be read: {error.strerror}") from error
    raise _bad_source(path, "is empty")


def _shards(files: ImageFiles, sizes: list[int], seed: int, shard_bytes: int) -> list[list[_Sample]]:
    # Sorted by hash: an order that no library's random generator can change from one version to the next.
    images = zip(files.files, files.labels.tolist(), sizes, strict=True)
    mixed = enumerate(sorted(images, key=lambda image: _sha256(f"{seed}/{image[0]}".encode())))
    samples = [_Sample(f"{number:09d}", path, str(label), size) for number, (path, label, size) in mixed]
    ends = np.cumsum([sample.span for sample in samples])
    num_shards = min(len(samples), -(-int(ends[-1]) // shard_bytes))
    cuts = np.flatnonzero(np.diff((ends - 1) * num_shards // ends[-1])) + 1
    return [samples[begin:end] for begin, end in pairwise([0, *cuts.tolist(), len(samples)])]


def _make_shard(root: Path, base: Path, samples: list[_Sample]) -> Json:
    """Write `base`.tar, .idx and .tsv where they are not there and whole; returns the manifest's entry."""
    tar, idx, tsv = (base.with_suffix(suffix) for suffix in (".tar", ".idx", ".tsv"))
    kept = False
    with suppress(FileNotFoundError), tar.open("rb") as file:
        there = map(file.read, [*(sample.span for sample in samples), -1])
        index, record, entry = _describe(tar.name, samples, there)
        kept = idx.read_bytes() == index and tsv.read_bytes() == record
    if not kept:
        (base.parent / MANIFEST).unlink(missing_ok=True)  # it vouches for what is replaced here
        with whole(tar) as file:
            index, record, entry = _describe(tar.name, samples, _blocks(root, samples, file))
        _write(idx, index)
        _write(tsv, record)
    for path, text in ((idx, index), (tsv, record)):
        entry[path.suffix[1:]] = {"file": path.name, "bytes": len(text), "sha256": _sha256(text)}
    return entry


def _describe(name: str, samples: list[_Sample], blocks: Iterable[bytes]) -> tuple[bytes, bytes, Json]:
    """A tar's .idx, .tsv and entry in the manifest. blocks: all that it holds, cut after each sample."""
    total, size = hashlib.sha256(), 0
    index, record = [f"v1.2 {len(samples)}\n"], []
    for sample, block in zip((*samples, None), blocks, strict=True):
        if sample is not None:
            (key, path, label, length), kind = sample, sample.kind
            image, number = size + BLOCKSIZE, size + sample.span - BLOCKSIZE  # where the data begin
            index.append(f"{kind} {image} {length} {key}.{kind} cls {number} {len(label)} {key}.cls\n")
            digest = _sha256(block[BLOCKSIZE : BLOCKSIZE + length])
            record.append(f"{key}\t{label}\t{length}\t{digest}\t{path}\n")
        total.update(block)
        size += len(block)
    entry = {"images": len(samples), "tar": {"file": name, "bytes": size, "sha256": total.hexdigest()}}
    head = f"{name}\t{size}\t{total.hexdigest()}\n"
    return "".join(index).encode(), "".join([head, *record]).encode(), entry


def _blocks(root: Path, samples: list[_Sample], file: BinaryIO) -> Iterator[bytes]:
    """All of a tar, cut after each sample, and written to `file` on the way."""
    for sample in samples:
        path = root / sample.path
        try:
            image = path.read_bytes()
        except OSError as error:
            raise _bad_source(path, f"cannot be read: {error.strerror}") from error
        if len(image) != sample.size:
            raise _bad_source(path, f"has changed: {sample.size} bytes at the start, {len(image)} now")
        block = _member(f"{sample.key}.{sample.kind}", image)
        block += _member(f"{sample.key}.cls", sample.label.encode())
        file.write(block)
        yield block
    size = file.tell() + 2 * BLOCKSIZE  # two empty blocks end a tar, and more fill its last record
    end = bytes(2 * BLOCKSIZE + -size % RECORDSIZE)
    file.write(end)
    yield end


def _member(name: str, data: bytes) -> bytes:
    header = TarInfo(name)  # owner 0, mode 644 and time 0 by default
    header.size = len(data)
    return header.tobuf(USTAR_FORMAT) + data + bytes(-len(data) % BLOCKSIZE)


def _bad_source(path: Path, what: str) -> ValueError:
    return ValueError(f"{path} {what}. Finished shards are kept; `acdc verify-data` finds all such files")


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def _write(path: Path, data: bytes) -> None:
    if not path.exists() or path.read_bytes() != data:
        with whole(path) as file:
            file.write(data)


def _start_worker() -> None:
    """Ctrl-C is the parent's to answer, and no worker outlives the parent, however that ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
