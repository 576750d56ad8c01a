"""From the data section of a recipe to this rank's loaders."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from data import sources
from data.arrays import ImageArrays
from data.dali import DaliArrayLoader
from data.idx import Split
from data.random_labels import randomise
from data.stream import EvalStream, TrainStream
from trainer import ranks
from trainer.config import Config, DataConfig
from trainer.errors import as_user_error


@dataclass
class Loaders:
    """arrays: the training set. watched: further sets to evaluate on after every epoch, by the name of their
    record: with random labels "memorised", the relabelled images, and "memorised_true", the same with their
    true labels."""

    arrays: ImageArrays
    train: DaliArrayLoader
    test: DaliArrayLoader
    watched: dict[str, DaliArrayLoader] = field(default_factory=dict)

    def describe(self) -> str:
        text = f"{len(self.arrays):,} training and {self.test.num_images:,} test images"
        text += f" from {self.arrays.source}"
        if self.watched:
            text += f", {self.watched['memorised'].num_images:,} with random labels"
        return text


def build_loaders(config: Config, device: torch.device) -> Loaders:
    """Raises UserError for a data set that is missing or damaged, EnvironmentLacks without DALI."""
    data = config.data
    with as_user_error("data"):
        train, watched = load_split(data, "train"), {}
        if data.random_labels:
            drawn = randomise(train, data.random_labels, config.seed)
            train = drawn.train
            watched = {"memorised": drawn.random, "memorised_true": drawn.true}
        stream = TrainStream(
            len(train),
            data.batch_size,
            config.seed,
            ranks.rank(),
            ranks.world_size(),
            config.engine.accumulation_steps,
            data.crop_padding,
            data.flip,
        )
        return Loaders(
            train,
            DaliArrayLoader(train, stream, device, data.num_threads),
            _eval_loader(load_split(data, "test"), data, device),
            {name: _eval_loader(arrays, data, device) for name, arrays in watched.items()},
        )


def build_test_loader(data: DataConfig, device: torch.device) -> DaliArrayLoader:
    """Raises UserError for a data set that is missing or damaged, EnvironmentLacks without DALI."""
    with as_user_error("data"):
        return _eval_loader(load_split(data, "test"), data, device)


def load_split(data: DataConfig, split: Split) -> ImageArrays:
    return sources.load(data.name, None if data.root is None else Path(data.root).expanduser(), split)


def _eval_loader(arrays: ImageArrays, data: DataConfig, device: torch.device) -> DaliArrayLoader:
    stream = EvalStream(len(arrays), data.eval_batch_size, ranks.rank(), ranks.world_size())
    return DaliArrayLoader(arrays, stream, device, data.num_threads)
