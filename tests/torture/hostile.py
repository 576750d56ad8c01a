"""Files made to harm: to run code, to write elsewhere, to fill the memory or to end a run in a traceback."""

from __future__ import annotations

import json
import os
import pickle
import struct
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from data.crops import CropStream
from data.dali.records import DaliRecordLoader, count_records
from data.datasets import cifar, fashion_mnist
from data.images.records import find_records
from tests.hostile import Evil
from trainer.checkpoints import checkpoint
from trainer.checkpoints.mask_history import load_masks
from trainer.checkpoints.run_dir import find_resumed
from trainer.checkpoints.saved_model import build_model
from trainer.checkpoints.weights import load_weights
from trainer.config.load import load_config
from trainer.errors import Failure
from trainer.export.sparse24_file import read_sparse24
from trainer.originals.checkpoints import load_original
from trainer.originals.recipes import Command, import_config

TRAP = "executed"  # the file that hostile ones try to make
HUGE = 2**62


def hostile(scratch: Path, every: int = 1) -> Iterator[bool]:
    """For each file, or each so many, and each way to read it: whether it did nothing, and was refused in
    words or taken."""
    trap, folder = scratch / TRAP, scratch / "hostile"
    folder.mkdir(parents=True)
    kinds = (
        (_pickles(trap), ".pt", (_as_state, load_original, _as_weights, _as_cifar)),
        (_archives(trap), ".npz", (_as_images, load_masks)),
        (_safetensors(), ".safetensors", (_as_weights, read_sparse24)),
        (_texts(trap), ".yaml", (_as_recipe, _as_original_recipe, _as_config_of_a_run)),
        (_tars(trap), ".tar", (_as_shard,)),
    )
    for contents, suffix, readers in kinds:
        for number, content in enumerate(islice(contents, 0, None, every)):
            for read in readers:
                place = folder / f"{suffix[1:]}-{number}-{read.__name__}"
                place.mkdir()
                file = place / f"file{suffix}"
                file.write_bytes(content)
                fault = None
                try:
                    read(file)
                except (Failure, ValueError, OSError):  # which end in a message wherever files are read
                    pass
                except Exception as error:
                    fault = f"{type(error).__name__}: {error}"
                if trap.exists():
                    fault = "it was executed"
                if fault:
                    print(f"\n{file}: {fault}", file=sys.stderr)
                yield fault is None


def _pickles(trap: Path) -> Iterator[bytes]:
    evils = [
        Evil(os.system, f"touch {trap}"),
        Evil(eval, f"open({str(trap)!r}, 'w')"),
        Evil(exec, f"open({str(trap)!r}, 'w')"),
        Evil(open, str(trap), "w"),
        Evil(os.mkdir, str(trap)),
        Evil(Path.touch, trap),
    ]
    for evil in evils:
        for nested in (evil, {"state_dict": {"weight": evil}}, {b"data": evil}, [evil] * 3):
            raw = pickle.dumps(nested, protocol=2)
            zipped = BytesIO()
            with zipfile.ZipFile(zipped, "w") as archive:
                archive.writestr("archive/data.pkl", raw)
                archive.writestr("archive/version", "3")
            yield from (raw, zipped.getvalue())


def _archives(trap: Path) -> Iterator[bytes]:
    """npz files: pickles in them, sizes that no memory has, headers that are code or endless."""
    evil = pickle.dumps(Evil(os.system, f"touch {trap}"))
    shape = "{'descr': '|u1', 'fortran_order': False, 'shape': %s}"
    headers = (
        "{'descr': '|O', 'fortran_order': False, 'shape': ()}",
        f"__import__('os').system('touch {trap}')",
        *(shape % size for size in ("(100000000000000, 28, 28)", f"({10**40},)", "(-1, 28, 28)", "('a',)")),
        "[" * 5000,
    )
    names = ("train_images", "train_labels", "test_images", "test_labels", "conv", "conv.shape")
    for header in headers:
        head = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header) + 1) + header.encode() + b"\n"
        archive = BytesIO()
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
            for name in names:
                file.writestr(f"{name}.npy", head + evil)
            file.writestr("../../executed", b"")
        yield archive.getvalue()


def _safetensors() -> Iterator[bytes]:
    tensor = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
    headers: list[Any] = [
        {"weight": {**tensor, "data_offsets": [0, HUGE]}},
        {"weight": {**tensor, "data_offsets": [16, 0]}},
        {"weight": {**tensor, "shape": [HUGE, HUGE]}},
        {"weight": {**tensor, "shape": [-1]}},
        {"weight": {**tensor, "dtype": "O"}},
        {"weight": tensor, "bias": tensor},
        {"__metadata__": {"shapes": "[1]"}, "weight": tensor},
        *({"__metadata__": {key: value}, "weight": tensor} for key, value in _shapes()),
        [[]],
    ]
    for header in headers:
        text = json.dumps(header).encode()
        yield struct.pack("<Q", len(text)) + text + bytes(16)
    yield struct.pack("<Q", HUGE) + b"{}"
    yield struct.pack("<Q", 20_000) + b"[" * 20_000


def _shapes() -> Iterator[tuple[str, str]]:
    from trainer.export.sparse24_file import SHAPES

    for value in (
        '"x"',
        "[1]",
        '{"weight": 1}',
        '{"weight": []}',
        '{"x": [2, 2]}',
        f'{{"weight": [{HUGE}, 4]}}',
    ):
        yield SHAPES, value
    yield SHAPES, "[" * 5000


def _texts(trap: Path) -> Iterator[bytes]:
    """YAML: objects of Python's, aliases without end, depth, keys that cannot be keys."""
    touch = f"touch {trap}"
    lines = "".join(f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 10)}]\n" for n in range(9))
    for text in (
        f"seed: !!python/object/apply:os.system ['{touch}']",
        f"seed: !!python/object/new:os.system ['{touch}']",
        f"seed: !!python/object/apply:subprocess.check_output [['touch', '{trap}']]",
        "seed: !!python/name:os.system",
        "seed: !!python/module:os",
        f"a0: &a0 [x]\n{lines}",
        f"a0: &a0 {{x: 1}}\n{lines.replace('[', '{<<: [').replace(']', ']}')}",
        "seed: &a [*a]",
        "&a {*a: 1}",
        "[" * 100_000,
        "{a: " * 5_000,
        "? {a: 1}\n: 2",
        "base: ../../../../etc/passwd",
        "base: file.yaml",
        f"seed: {'9' * 100_000}",
        "\x00",
    ):
        yield text.encode()
    yield b"\xff\xfe\x00"


def _tars(trap: Path) -> Iterator[bytes]:
    """WebDataset tars: names that lead out of the folder, links, devices, sizes and labels that are none."""
    picture = BytesIO()
    Image.new("RGB", (16, 16)).save(picture, "JPEG")
    jpeg = picture.getvalue()
    for name in ("../../executed", str(trap), "000"):
        yield _tar([(f"{name}.jpg", jpeg), (f"{name}.cls", b"0")])
    for label in (b"x", b"", b"-1", b"9" * 40, b"1e3", "\u0663".encode()):
        yield _tar([("000.jpg", jpeg), ("000.cls", label)])
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
        yield _tar([("000.jpg", jpeg), ("000.cls", b"0")], kind, "/etc/passwd")
    whole = _tar([("000.jpg", jpeg), ("000.cls", b"0")])
    yield whole[:700]
    yield whole[:124] + b"77777777777\0" + whole[136:]


def _tar(members: list[tuple[str, bytes]], kind: bytes = tarfile.REGTYPE, target: str = "") -> bytes:
    content = BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.type, info.linkname = len(data), kind, target
            if kind == tarfile.REGTYPE:
                tar.addfile(info, BytesIO(data))
            else:
                info.size = 0
                tar.addfile(info)
    return content.getvalue()


def _as_state(file: Path) -> None:
    """A checkpoint that holds it, with digests that fit."""
    folder = file.parent / "step-000000001"
    checkpoint.save(folder, {checkpoint.STATE: {}}, {})
    (folder / checkpoint.STATE).write_bytes(file.read_bytes())
    manifest = {"format": checkpoint.FORMAT, "info": {}}
    manifest["sha256"] = {checkpoint.STATE: checkpoint.sha256(folder / checkpoint.STATE)}
    manifest[checkpoint.OWN_DIGEST] = checkpoint.digest_of(manifest)
    (folder / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    checkpoint.read(folder, checkpoint.STATE)


def _as_weights(file: Path) -> None:
    info = {"name": "resnet20", "num_classes": 2, "arguments": {}}
    load_weights(build_model(info), file, None, info)


def _as_cifar(file: Path) -> None:
    folder = file.parent / cifar.CIFAR10.python_folder
    folder.mkdir()
    file.rename(folder / "test_batch")
    cifar.load(cifar.CIFAR10, file.parent, "test")


def _as_images(file: Path) -> None:
    file.rename(file.with_name("fashion_mnist.npz"))
    fashion_mnist.load(file.parent, "test")


def _as_recipe(file: Path) -> None:
    load_config(str(file))


def _as_original_recipe(file: Path) -> None:
    import_config(file, Command(epochs=10))


def _as_config_of_a_run(file: Path) -> None:
    file.rename(file.with_name("config.yaml"))
    checkpoint.save(file.parent / "checkpoints" / "step-000000001", {checkpoint.STATE: {}}, {})
    find_resumed(load_config("quickstart", [f"resume={file.parent}"]))


def _as_shard(file: Path) -> None:
    """With an index as DALI's own tool makes it, and one that leads beyond the end."""
    folder = file.parent / "train"
    folder.mkdir()
    (tar := folder / "0.tar").write_bytes(file.read_bytes())
    places = []
    try:
        with tarfile.open(tar) as members:
            places = [(member.name, member.offset_data, member.size) for member in members]
    except tarfile.TarError:
        pass
    columns = (f"{name[-3:]} {offset} {size} {name}" for name, offset, size in places)
    found = " ".join(columns)
    for line in (found, found.replace("000.jpg", "x"), f"jpg {HUGE} 9 0.jpg cls 1 {HUGE} 0.cls", "jpg"):
        (folder / "0.idx").write_text(f"v1.2 1\n{line}\n")
        try:
            records = find_records(file.parent, "train", "webdataset")
            stream = CropStream(count_records(records), 1, seed=1, flip=False, sizes=((0, 8),))
            loader = DaliRecordLoader(records, 2, 0, stream, torch.device("cpu"), 1, "cpu", lambda *_: None)
        except (Failure, ValueError, OSError):
            continue
        try:
            list(loader.epoch(0))
        except OSError:
            continue
        except ValueError as error:  # has no words once a run is under way
            raise RuntimeError(str(error)) from error
