"""Images to pack into shards, and what came of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from data.images.files import load_image_files
from data.images.shards import write_shards

SHARD_BYTES = 25_000


def add_image(path: Path, random: np.random.Generator, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = random.integers(20, 60, 2)
    Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8)).save(path, **options)


def make_tree(root: Path, num_images: int) -> Path:
    random = np.random.default_rng(0)
    for number in range(num_images):
        suffix = ("JPEG", "jpg", "jpeg")[number % 3]
        add_image(root / "train" / "abc"[number % 7 % 3] / f"image {number}.{suffix}", random, format="JPEG")
    return root


def write(root: Path, destination: Path, files=None, **options):
    defaults = {"shard_bytes": SHARD_BYTES, "seed": 7, "workers": 1, "on_progress": lambda done, total: None}
    return write_shards(files or load_image_files(root, "train"), destination, **defaults | options)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def identities(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()}


def flip_a_bit(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def samples_in_shards(folder: Path) -> list[int]:
    shards = json.loads((folder / "manifest.json").read_text())["content"]["shards"]
    return [shard["images"] for shard in shards]
