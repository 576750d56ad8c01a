"""From the data section of a recipe to this rank's loaders: find_source decides, once, what kind of source it
is, and each kind makes its own loaders for training and evaluation.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from data.augment import Augment
from data.crops import CropStream
from data.dali.arrays import DaliArrayLoader
from data.dali.decode import DeviceJpeg
from data.dali.files import DaliFileLoader
from data.dali.records import DaliRecordLoader, count_records
from data.datasets import imagenet
from data.datasets.arrays import ImageArrays
from data.datasets.classes import CLASSES
from data.datasets.idx import Split
from data.datasets.random_labels import randomise
from data.datasets.sources import SOURCES
from data.images.files import EXTENSIONS, FOLDERS, ImageFiles, count_of, load_image_files
from data.images.records import RecordFiles, find_records
from data.images.share import load_share
from data.loader import ImageInfo, Loader
from data.stream import EvalStream, Stream, TrainStream
from data.synthetic import SyntheticLoader
from data.torch_files import TorchFileLoader
from trainer.config.data import ArrayData, DataConfig, ImageNetData
from trainer.config.schema import Config
from trainer.distributed import ranks
from trainer.errors import as_user_error
from trainer.paths import user_path

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
    """What happens to files that cannot be decoded: counted and logged; where recipes say "stop", `failure`
    asks the training loop to save and end. Loaders call this object, and put another image in their place."""

    def __init__(self, on_error: str) -> None:
        self.on_error = on_error
        self.count = 0
        self.failure: str | None = None

    def __call__(self, file: str, reason: str) -> None:
        self.count += 1
        log.error("%s cannot be decoded: %s", file, reason)
        if self.on_error == "stop" and self.failure is None:
            self.failure = f"{file} cannot be decoded: {reason}"


class Source(Protocol):
    """One kind of data, on one device. Raises OSError or ValueError for what is missing or damaged."""

    def loaders(self, share: Mapping[str, Any]) -> Loaders:
        """For a run. share: how ranks share the batches, see data.stream.TrainStream."""

    def test_loader(self) -> Loader:
        """For evaluation alone."""


def build_loaders(config: Config, device: torch.device) -> Loaders:
    """Raises UserError for a data set that is missing or damaged, EnvironmentFailure without DALI."""
    share = {
        "global_batch": config.data.batch_size,
        "seed": config.seed,
        "rank": ranks.rank(),
        "world_size": ranks.world_size(),
        "micro_batches": config.engine.accumulation_steps,
        "max_steps": config.steps_per_epoch,
    }
    with as_user_error("data"):
        return find_source(config.data, device).loaders(share)


def build_test_loader(data: DataConfig, device: torch.device) -> Loader:
    """Files that cannot be decoded are left out. Raises as build_loaders."""
    with as_user_error("data"):
        return find_source(data, device, on_error="skip").test_loader()


def find_source(data: DataConfig, device: torch.device, on_error: str | None = None) -> Source:
    """on_error: in place of the recipe's."""
    if isinstance(data, ArrayData):
        return Arrays(data, device)
    bad_files = BadFiles(on_error or data.on_error)
    if data.backend == "synthetic":
        return Noise(data, device, bad_files)
    return (Folders if data.format == "folders" else Packed)(data, device, bad_files)


@dataclass(frozen=True)
class Arrays:
    """Small images in memory, by DALI."""

    data: ArrayData
    device: torch.device

    def loaders(self, share: Mapping[str, Any]) -> Loaders:
        train, watched = self._split("train"), {}
        if self.data.random_labels:
            drawn = randomise(train, self.data.random_labels, share["seed"])
            train = drawn.train
            watched = {"memorised": drawn.random, "memorised_true": drawn.true}
        crops: dict[str, Any] = {"crop_padding": self.data.crop_padding, "flip": self.data.flip}
        stream = TrainStream(len(train), **share, **crops, augment=_augment(self.data))
        loader = DaliArrayLoader(train, stream, self.device, self.data.num_threads)
        evaluated = {name: self._evaluation(arrays) for name, arrays in watched.items()}
        info = replace(train.info, classes=CLASSES[self.data.name])
        return Loaders(info, train.source, loader, self.test_loader(), evaluated)

    def test_loader(self) -> Loader:
        return self._evaluation(self._split("test"))

    def _split(self, split: Split) -> ImageArrays:
        return SOURCES[self.data.name](_path(self.data.root), split)

    def _evaluation(self, arrays: ImageArrays) -> Loader:
        stream = EvalStream(len(arrays), self.data.eval_batch_size, ranks.rank(), ranks.world_size())
        return DaliArrayLoader(arrays, stream, self.device, self.data.num_threads)


@dataclass(frozen=True)
class _Images:
    """What sources of images of any size share: crops, evaluation, where they are decoded."""

    data: ImageNetData
    device: torch.device
    bad_files: BadFiles

    def _crops(self, num_images: int, share: Mapping[str, Any]) -> CropStream:
        data = self.data
        crops: dict[str, Any] = {"flip": data.flip, "min_area": data.min_area, "sizes": data.sizes}
        return CropStream(num_images, **share, **crops, augment=_augment(data))

    def _in_order(self, num_images: int) -> EvalStream:
        return EvalStream(num_images, self.data.eval_batch_size, ranks.rank(), ranks.world_size())

    def _loaders(
        self, source: str, num_classes: int, train: Loader, test: Loader, classes: tuple[str, ...] = ()
    ) -> Loaders:
        size = self.data.eval_size
        info = ImageInfo((3, size, size), num_classes, imagenet.MEAN, imagenet.STD, classes)
        return Loaders(info, source, train, test, bad_files=self.bad_files)

    @property
    def _root(self) -> Path:
        return imagenet.imagenet_root(_path(self.data.root))

    @property
    def _evaluation(self) -> tuple[int, int]:
        return self.data.eval_resize, self.data.eval_size

    @property
    def _threads(self) -> int:
        """On a CPU the model's own threads need the cores: they take far longer over an image."""
        share = ranks.num_cores()
        return self.data.num_threads or (share if self.device.type == "cuda" else max(1, share // 4))

    def _dali(self, evaluation: tuple[int, int] | None = None) -> tuple[Any, ...]:
        """(device, num_threads, decode_on, on_bad, evaluation, jpeg) of a DaliImageLoader."""
        on_gpu = self.device.type == "cuda"
        if self.data.device == "gpu" and not on_gpu:
            raise ValueError("data.device=gpu decodes on a GPU, and this run has none; use auto or cpu")
        decode_on = "gpu" if on_gpu and self.data.device != "cpu" else "cpu"
        data = self.data
        jpeg = DeviceJpeg(data.decoder_engine_load, data.decoder_width_hint, data.decoder_height_hint)
        return self.device, self._threads, decode_on, self.bad_files, evaluation, jpeg


class Noise(_Images):
    """No files: batches made once, on the device."""

    def loaders(self, share: Mapping[str, Any]) -> Loaders:
        stream = self._crops(imagenet.NUM_TRAIN, share)
        counts = stream.num_images, stream.batches_per_epoch, stream.batch_size
        train = SyntheticLoader(*counts, stream.size, imagenet.NUM_CLASSES, self.device)
        return self._loaders("noise", imagenet.NUM_CLASSES, train, self.test_loader())

    def test_loader(self) -> Loader:
        batches, batch = SYNTHETIC_EVAL_BATCHES, self.data.eval_batch_size
        counts = batches * batch * ranks.world_size(), batches, batch
        return SyntheticLoader(*counts, lambda _: self.data.eval_size, imagenet.NUM_CLASSES, self.device)


class Folders(_Images):
    """Image files in class folders, by DALI or torch."""

    def loaders(self, share: Mapping[str, Any]) -> Loaders:
        files = self._files("train", keep_excluded=True)
        source = str(self._root)
        if self.data.name == "imagefolder":
            shown = ", ".join([*files.classes[:10], *["..."] * (files.num_classes > 10)])
            source += f", {files.num_classes} classes ({shown})"
        if self._is_shared:
            percent = 100 * (self.data.val_share or 0)
            source += f", no val folder: {percent:g} % of each class split off"
        if files.excluded:
            source += f", {len(files.excluded)} of them excluded and replaced"
        train = self._loader(files, self._crops(len(files), share))
        return self._loaders(source, files.num_classes, train, self.test_loader(), files.classes)

    def test_loader(self) -> Loader:
        files = self._files("test")
        return self._loader(files, self._in_order(len(files)), self._evaluation)

    def _files(self, split: Split, keep_excluded: bool = False) -> ImageFiles:
        data, root = self.data, self._root
        if data.val_share is not None and self._is_shared:
            files = load_share(root, split, data.val_share, data.val_seed, keep_excluded)
        else:
            files = load_image_files(root, split, _path(data.val_labels), keep_excluded)
        if files.left_out and not (self._is_shared and split == "test"):  # said of the other part already
            read, found = ", ".join(EXTENSIONS), count_of(files.left_out)
            log.warning("left out of %s, formats that are not read: %s; read are %s", root, found, read)
        return files

    @property
    def _is_shared(self) -> bool:
        """Whether validation images are split off the training ones."""
        return self.data.val_share is not None and not (self._root / FOLDERS["test"]).is_dir()

    def _loader(self, files: ImageFiles, stream: Stream, evaluation: tuple[int, int] | None = None) -> Loader:
        if self.data.backend == "torch":
            return TorchFileLoader(files, stream, self.device, self._threads, self.bad_files, evaluation)
        return DaliFileLoader(files, stream, *self._dali(evaluation))


class Packed(_Images):
    """Images in WebDataset, TFRecord or RecordIO files, by DALI."""

    def loaders(self, share: Mapping[str, Any]) -> Loaders:
        records, num_classes = self._records("train")
        stream = self._crops(count_records(records), share)
        train = DaliRecordLoader(records, num_classes, self.data.first_label, stream, *self._dali())
        return self._loaders(f"{self._root}, {self.data.format}", num_classes, train, self.test_loader())

    def test_loader(self) -> Loader:
        records, num_classes = self._records("test")
        stream, labels = self._in_order(count_records(records)), (num_classes, self.data.first_label)
        return DaliRecordLoader(records, *labels, stream, *self._dali(self._evaluation))

    def _records(self, split: Split) -> tuple[RecordFiles, int]:
        """The files, and how many classes they hold."""
        records = find_records(self._root, split, self.data.format)
        return records, records.num_classes or self.data.num_classes or imagenet.NUM_CLASSES


def _augment(data: DataConfig) -> Augment | None:
    if data.augment == "none":
        return None
    if data.augment == "rand":
        return Augment("rand", data.rand_ops, data.rand_magnitude)
    return Augment("trivial")


def _path(text: str | None) -> Path | None:
    return None if text is None else user_path(text)


def cure_of_bad_files(data: DataConfig) -> str:
    """What to do where a file that cannot be decoded has ended a run."""
    skip = "others stand in for such images with data.on_error=skip"
    if getattr(data, "format", "folders") != "folders":
        return f"Let {skip}"
    root = getattr(data, "root", None) or "ROOT"
    return f"Find and exclude all such files with acdc verify-data {root} --exclude, or let {skip}"
