"""From the data section of a recipe to this rank's loaders."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from data.crops import CropStream
from data.dali.arrays import DaliArrayLoader
from data.dali.files import DaliFileLoader
from data.dali.records import DaliRecordLoader, count_records
from data.datasets import imagenet, sources
from data.datasets.arrays import ImageArrays
from data.datasets.idx import Split
from data.datasets.random_labels import randomise
from data.images.files import load_image_files
from data.images.records import find_records
from data.loader import ImageInfo, Loader
from data.stream import EvalStream, TrainStream
from data.synthetic import SyntheticLoader
from data.torch_files import TorchFileLoader
from trainer.config.data import ArrayData, DataConfig, ImageNetData
from trainer.config.schema import Config
from trainer.distributed import ranks
from trainer.errors import as_user_error

SYNTHETIC_EVAL_BATCHES = 2  # there is no accuracy to be found in noise

log = logging.getLogger(__name__)


@dataclass
class Loaders:
    """source: where the images come from, for people. watched: further sets to evaluate on after every epoch,
    by the name of their record: with random labels "memorised", the relabelled images, and "memorised_true",
    the same with their true labels. bad_files: met so far on this rank."""

    info: ImageInfo
    source: str
    train: Loader
    test: Loader
    watched: dict[str, Loader] = field(default_factory=dict)
    bad_files: BadFiles = field(default_factory=lambda: BadFiles("stop"))

    def describe(self) -> str:
        counts = f"{self.train.num_images:,} training and {self.test.num_images:,} test images"
        text = f"{counts} from {self.source}"
        if self.watched:
            text += f", {self.watched['memorised'].num_images:,} with random labels"
        return text


class BadFiles:
    """What happens to files that cannot be decoded: counted and told; where recipes say "stop", `failure`
    asks the training loop to save and end. A loader calls this object, and puts another image in the file's
    place."""

    def __init__(self, on_error: str) -> None:
        self.on_error = on_error
        self.count = 0
        self.failure: str | None = None

    def __call__(self, file: str, reason: str) -> None:
        self.count += 1
        log.error("%s cannot be decoded: %s", file, reason)
        if self.on_error == "stop" and self.failure is None:
            self.failure = f"{file} cannot be decoded: {reason}"


def build_loaders(config: Config, device: torch.device) -> Loaders:
    """Raises UserError for a data set that is missing or damaged, EnvironmentLacks without DALI."""
    with as_user_error("data"):
        if isinstance(config.data, ImageNetData):
            return _imagenet_loaders(config, config.data, device)
        return _array_loaders(config, config.data, device)


def build_test_loader(data: DataConfig, device: torch.device) -> Loader:
    """Raises UserError for a data set that is missing or damaged, EnvironmentLacks without DALI."""
    with as_user_error("data"):
        if isinstance(data, ImageNetData):
            return _imagenet_test(data, device, BadFiles("skip"))
        return _eval_arrays(load_split(data, "test"), data, device)


def load_split(data: ArrayData, split: Split) -> ImageArrays:
    return sources.load(data.name, _path(data.root), split)


def _array_loaders(config: Config, data: ArrayData, device: torch.device) -> Loaders:
    train, watched = load_split(data, "train"), {}
    if data.random_labels:
        drawn = randomise(train, data.random_labels, config.seed)
        train = drawn.train
        watched = {"memorised": drawn.random, "memorised_true": drawn.true}
    stream = TrainStream(len(train), **_sharing(config), crop_padding=data.crop_padding, flip=data.flip)
    return Loaders(
        train.info,
        train.source,
        DaliArrayLoader(train, stream, device, data.num_threads),
        _eval_arrays(load_split(data, "test"), data, device),
        {name: _eval_arrays(arrays, data, device) for name, arrays in watched.items()},
    )


def _eval_arrays(arrays: ImageArrays, data: ArrayData, device: torch.device) -> Loader:
    stream = EvalStream(len(arrays), data.eval_batch_size, ranks.rank(), ranks.world_size())
    return DaliArrayLoader(arrays, stream, device, data.num_threads)


def _imagenet_loaders(config: Config, data: ImageNetData, device: torch.device) -> Loaders:
    bad_files = BadFiles(data.on_error)
    sharing = {**_sharing(config), "flip": data.flip, "min_area": data.min_area, "sizes": data.sizes}
    train: Loader
    if data.backend == "synthetic":
        source, num_classes = "noise", imagenet.NUM_CLASSES
        stream = CropStream(imagenet.NUM_TRAIN, **sharing)
        counts = stream.num_images, stream.batches_per_epoch, stream.batch_size
        train = SyntheticLoader(*counts, stream.size, num_classes, device)
    elif data.format != "folders":
        root = imagenet.imagenet_root(_path(data.root))
        records = find_records(root, "train", data.format)
        source = f"{root}, {data.format}"
        num_classes = records.num_classes or data.num_classes or imagenet.NUM_CLASSES
        stream = CropStream(count_records(records), **sharing)
        labels = (num_classes, data.first_label)
        train = DaliRecordLoader(records, *labels, stream, device, *_dali(data, device), bad_files)
    else:
        root = imagenet.imagenet_root(_path(data.root))
        files = load_image_files(root, "train", keep_excluded=True)
        source, num_classes = str(root), files.num_classes
        if files.excluded:
            source += f", {len(files.excluded)} of them excluded and replaced"
        stream = CropStream(len(files), **sharing)
        if data.backend == "torch":
            train = TorchFileLoader(files, stream, device, _threads(data, device), bad_files)
        else:
            train = DaliFileLoader(files, stream, device, *_dali(data, device), bad_files)
    info = ImageInfo((3, data.eval_size, data.eval_size), num_classes, imagenet.MEAN, imagenet.STD)
    return Loaders(info, source, train, _imagenet_test(data, device, bad_files), bad_files=bad_files)


def _imagenet_test(data: ImageNetData, device: torch.device, on_bad: Callable[[str, str], None]) -> Loader:
    batch, crop = data.eval_batch_size, (data.eval_resize, data.eval_size)
    share = (batch, ranks.rank(), ranks.world_size())
    if data.backend == "synthetic":
        num_images = SYNTHETIC_EVAL_BATCHES * batch * ranks.world_size()
        counts = (num_images, SYNTHETIC_EVAL_BATCHES, batch)
        return SyntheticLoader(*counts, lambda _: data.eval_size, imagenet.NUM_CLASSES, device)
    root = imagenet.imagenet_root(_path(data.root))
    if data.format != "folders":
        records = find_records(root, "test", data.format)
        stream = EvalStream(count_records(records), *share)
        labels = (records.num_classes or data.num_classes or imagenet.NUM_CLASSES, data.first_label)
        return DaliRecordLoader(records, *labels, stream, device, *_dali(data, device), on_bad, crop)
    files = load_image_files(root, "test", _path(data.val_labels))
    stream = EvalStream(len(files), *share)
    if data.backend == "torch":
        return TorchFileLoader(files, stream, device, _threads(data, device), on_bad, crop)
    return DaliFileLoader(files, stream, device, *_dali(data, device), on_bad, crop)


def _dali(data: ImageNetData, device: torch.device) -> tuple[int, str]:
    """(threads, where images are decoded)."""
    if data.device == "gpu" and device.type != "cuda":
        raise ValueError("data.device=gpu decodes on a GPU, and this run has none; use auto or cpu")
    return _threads(data, device), "gpu" if device.type == "cuda" and data.device != "cpu" else "cpu"


def _sharing(config: Config) -> dict[str, Any]:
    """How the ranks share the batches, for a TrainStream."""
    return {
        "global_batch": config.data.batch_size,
        "seed": config.seed,
        "rank": ranks.rank(),
        "world_size": ranks.world_size(),
        "micro_batches": config.engine.accumulation_steps,
        "max_steps": config.steps_per_epoch,
    }


def _threads(data: ImageNetData, device: torch.device) -> int:
    """On a CPU the model's own threads need the cores, and take far longer over an image than decoding
    does."""
    share = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_SIZE", 1))
    return data.num_threads or max(1, share if device.type == "cuda" else share // 4)


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text).expanduser()
