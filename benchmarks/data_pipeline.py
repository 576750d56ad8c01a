"""How fast image files become batches: DALI against the torch backend, on the same files in the same run.

All decode, crop, resize and flip the same windows of the same JPEGs into uint8 batches; nothing else runs.
They take turns, so that whatever else the machine does meets all. With a GPU there are more contenders, whose
batches end up on it: decoded there, by shares of its decoder engines, or on the CPU. What data cost a step of
training tells benchmarks.throughput.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.shared.machine import wait_for
from benchmarks.shared.record import (
    Parser,
    console,
    parse,
    settings,
    show_spread,
    show_table,
    spread,
    write_record,
)
from benchmarks.shared.turns import cpu_seconds, endless, family, order, ratios, until_quiet
from data.crops import CropStream
from data.dali.decode import DeviceJpeg
from data.dali.files import DaliFileLoader
from data.dali.pipeline import PREFETCH
from data.datasets import fashion_mnist
from data.datasets.imagenet import NUM_CLASSES
from data.images.files import ImageFiles, load_image_files
from data.loader import Batch, Loader
from data.torch_files import TorchFileLoader
from trainer.errors import exit_code_of

QUALITY = 90
SIZE = (500, 375)  # width and height: ImageNet's most frequent
ENGINE_LOADS = (0.0, 0.3, 0.65, 1.0)  # shares of a batch for a GPU's JPEG engines


def main() -> int:
    parser, tree = Parser("data", __doc__), "train/CLASS/*.JPEG and val; default: JPEGs made here"
    parser.add_argument("--root", type=Path, metavar="ROOT", help=tree)
    parser.add_number("--images", 1024, "how many images to make")
    parser.add_number("--batch", 64, "images in a batch")
    parser.add_number("--batches", None, "in a measurement; default: 16, or 8 a thread where that is more")
    parser.add_number("--repeats", 7, "measurements of each backend")
    parser.add_number("--threads", None, "or processes; default: one a core")
    options = parse(parser, "data")
    options.threads = options.threads or len(os.sched_getaffinity(0))
    options.batches = options.batches or max(16, 8 * options.threads)
    with tempfile.TemporaryDirectory() as folder:
        root = options.root or make_tree(Path(folder), options.images)
        files = load_image_files(root, "train")
        sizes = [(files.root / file).stat().st_size for file in files.files[:1000]]
        mean_kb = sum(sizes) / len(sizes) / 1000
        print(f"{len(files):,} files of {mean_kb:.0f} kB, {options.threads} threads or processes")
        measured = compare(files, options)
    show(measured)
    write_record(options.out, {"options": settings(options), "mean_kb": mean_kb, "loader": measured})
    return 0


def make_tree(root: Path, num_images: int, batch: int = 1) -> Path:
    """JPEGs of pictures with detail at all scales, about as large as ImageNet's (110 kB on average):
    Fashion-MNIST's images, three at a time in three colours, enlarged over texture. As many class folders as
    ImageNet's, so that models have its last layer; the last ones are empty where images are fewer.
    Raises SystemExit for fewer images than a batch has."""
    from PIL import Image

    if num_images < batch:
        raise SystemExit(f"--images {num_images}: a batch has {batch}")
    arrays = fashion_mnist.load(None, "train")
    random = np.random.default_rng(0)
    width, height = SIZE
    for label in range(NUM_CLASSES):
        (root / "train" / f"n{label:08}").mkdir(parents=True, exist_ok=True)

    def save(i: int, planes: np.ndarray, noise: np.ndarray) -> None:
        picture = Image.fromarray(planes.transpose(1, 2, 0)).resize(SIZE, Image.Resampling.BICUBIC)
        texture = noise.repeat(2, 0).repeat(2, 1)
        pixels = np.asarray(picture, np.float64).copy()
        pixels[: texture.shape[0], : texture.shape[1]] += texture
        for split in ("train", "val")[: 1 + (i < 64)]:
            folder = root / split / f"n{i % NUM_CLASSES:08}"
            folder.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            image.save(folder / f"{i:06}.JPEG", quality=QUALITY)

    with ThreadPoolExecutor() as pool:  # NumPy and Pillow let other threads run
        for begin in range(0, num_images, 256):  # so many are drawn, and wait in memory, at a time
            saved = []
            for i in range(begin, min(begin + 256, num_images)):
                planes = arrays.images[random.integers(0, len(arrays), 3), :, :, 0]
                noise = random.normal(0, 24, (height // 2, width // 2, 1))
                saved.append(pool.submit(save, i, planes, noise))
            for each in saved:
                each.result()
    return root


def compare(files: ImageFiles, options: argparse.Namespace) -> dict[str, Any]:
    """Images per second and per CPU-second of each backend, which take turns, and DALI's ratio."""
    stream = CropStream(len(files), options.batch, seed=1, flip=True)
    cpu, threads = torch.device("cpu"), options.threads
    loaders: dict[str, Loader] = {
        "dali": DaliFileLoader(files, stream, cpu, threads, "cpu", _refuse),
        "torch": TorchFileLoader(files, stream, cpu, threads, _refuse),
    }
    if torch.cuda.is_available():
        loaders |= _onto_gpu(files, stream, threads)
    batches = {name: endless(loader) for name, loader in loaders.items()}
    rates: dict[str, dict[str, list[float]]] = {name: {"wall": [], "cpu": []} for name in loaders}
    for repeat in range(options.repeats + 1):  # the first warms up
        for name in order(list(batches), repeat):
            wall, busy = measure_loader(batches[name], options.batches, max(PREFETCH + 1, 2 * threads))
            if repeat:
                images = options.batches * options.batch
                rates[name]["wall"].append(images / wall)
                rates[name]["cpu"].append(images / busy)
    table = {
        name: {"images_per_second": spread(rate["wall"]), "images_per_cpu_second": spread(rate["cpu"])}
        for name, rate in rates.items()
    }
    return {**table, "dali_over_torch_per_cpu_second": ratios(rates["dali"]["cpu"], rates["torch"]["cpu"])}


def _onto_gpu(files: ImageFiles, stream: CropStream, threads: int) -> dict[str, Loader]:
    gpu = torch.device("cuda", torch.cuda.current_device())
    loaders: dict[str, Loader] = {
        f"gpu, engines {load:.0%}": DaliFileLoader(
            files, stream, gpu, threads, "gpu", _refuse, None, DeviceJpeg(load)
        )
        for load in ENGINE_LOADS
    }
    return {**loaders, "cpu to gpu": DaliFileLoader(files, stream, gpu, threads, "cpu", _refuse)}


def measure_loader(
    batches: Iterator[Batch], count: int, read_ahead: int = PREFETCH + 1
) -> tuple[float, float]:
    """Seconds of wall clock and of all processors that `count` batches take. read_ahead: batches that the
    loader prepares. What is ready at first is used up before, and what is ready at last was made within."""
    until_quiet()  # no other loader reads ahead meanwhile
    for _ in range(2 * read_ahead):
        next(batches)
    processes = family()
    begin, cpu = time.perf_counter(), cpu_seconds(processes)
    for _ in range(count):
        batch = next(batches)
    wait_for(batch.images.device)
    return time.perf_counter() - begin, cpu_seconds(processes) - cpu


def _refuse(file: str, reason: str) -> None:
    raise SystemExit(f"{file} cannot be decoded: {reason}; acdc verify-data finds all such files")


def show(measured: dict[str, Any]) -> None:
    rows = [
        (name, *(show_spread(measured[name][key]) for key in ("images_per_second", "images_per_cpu_second")))
        for name in measured
        if "images_per_second" in measured[name]
    ]
    show_table(("backend", "images/s", "images per CPU-second"), rows, texts=("backend",))
    ratio = show_spread(measured["dali_over_torch_per_cpu_second"], 2)
    console().print(f"DALI over torch, per CPU-second: {ratio}; median (least to greatest) of the repeats")


if __name__ == "__main__":
    raise SystemExit(exit_code_of(main))
