"""The networks that benchmarks run: a recipe each, and the same model with stock layers for comparison."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from data.datasets.cifar import CIFAR10, CIFAR100, PIXELS
from data.loader import Batch
from sparsity import PhaseSchedule
from trainer.build import build_trainer
from trainer.checkpoints.saved_model import build_model, describe_model
from trainer.config.load import load_config
from trainer.config.schema import Config
from trainer.engine import precision
from trainer.loop import Trainer
from trainer.models import get_model
from trainer.models.classifier import Classifier
from trainer.optim import build_optimizer


@dataclass(frozen=True)
class Network:
    """recipe: under configs/, or a path. cpu_batch, gpu_batch: images of a step. overrides: of the recipe,
    besides. noise: stands in for the data, else the recipe's own are read."""

    recipe: str
    cpu_batch: int
    gpu_batch: int
    overrides: tuple[str, ...] = ()
    noise: bool = True

    @classmethod
    def of_run(cls, run: Path) -> Network:
        """What a run trains, by the recipe in its folder, at the start. Raises UserError."""
        recipe = str(run / "config.yaml")
        batch = load_config(recipe).data.batch_size
        starts = ("resume=null", "checkpoint=null", "model.weights=null", "finetune_dense=false")
        others = ("sparsity.gradual=null", "sparsity.recompute_batch_norm=null", "sparsity.accelerate=auto")
        return cls(recipe, batch, batch, (*starts, *others, "engine.accumulation_steps=1"), noise=False)

    @property
    def of_files(self) -> bool:
        """Trains on image files; else on small images in memory."""
        return self.recipe.startswith("imagenet")

    @property
    def num_classes(self) -> int:
        return {"imagenet": 1000, "cifar100": 100, "cifar10": 10}[self.recipe.partition("/")[0]]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        side = 224 if self.of_files else 32
        return 3, side, side

    def model(self) -> nn.Module:
        """Freshly initialised."""
        config = load_config(self.recipe).model
        return get_model(config.name, self.num_classes, **config.arguments)

    def batch(self, device: torch.device) -> int:
        return self.gpu_batch if device.type == "cuda" else self.cpu_batch


class _Networks(dict[str, Network]):
    def __missing__(self, name: str) -> NoReturn:
        raise SystemExit(f"no network {name!r}; there are {', '.join(self)}")


IN_EPOCH = 16  # batches that small images make, where they are read again and again
NETWORKS = _Networks(
    {
        "resnet50": Network("imagenet/resnet50_90", 32, 256),
        "mobilenetv1": Network("imagenet/mobilenetv1_90", 32, 512),
        "wrn-28-10": Network("cifar100/wide_resnet_dense13_90", 32, 512),
        "resnet20": Network("cifar10/memorisation_90", 128, 1024),
    }
)


def short_run(
    network: Network, folder: Path, schedule: str, batch: int, steps: int, *overrides: str
) -> Config:
    """The network's recipe with epochs of `steps` steps, over `schedule`; `overrides` come last."""
    options = [
        f"run_root={folder / 'runs'}",
        f"epochs={PhaseSchedule.parse(schedule).num_epochs}",
        f"sparsity.schedule={schedule}",
        "lr={kind: constant}",
        "optimizer.lr=0.001",  # noise teaches nothing, and must not make weights infinite
        f"steps_per_epoch={steps}",
        f"data.batch_size={batch}",
        f"data.eval_batch_size={batch}",
        "save.every=1000ep",
        "log.every=1000ep",
    ]
    if network.noise and network.of_files:
        options += ["data.backend=synthetic"]
    elif network.noise:
        options += [f"data.root={_noise_of(network, folder, steps * batch)}"]
        if "memorisation" in network.recipe:
            options += ["data.random_labels=0", "data.crop_padding=4", "data.flip=true"]
    return load_config(network.recipe, [*options, *network.overrides, *overrides])


@contextmanager
def short_trainer(
    network: Network, device: torch.device, schedule: str, batch: int, steps: int, *overrides: str
) -> Iterator[Trainer]:
    """The trainer of a short_run, in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        config = short_run(network, Path(folder), schedule, batch, steps, *overrides)
        with closing(build_trainer(config, device)) as trainer:
            yield trainer


def one_batch(trainer: Trainer) -> Batch:
    """A training batch that stays: what a step costs beside the data."""
    images, labels = next(trainer.loaders.train.epoch(0))
    return Batch(images.clone(memory_format=torch.channels_last), labels.clone())


class Stock:
    """The same model with stock layers, in a plain PyTorch loop: compiled, channels_last, fused SGD."""

    def __init__(self, trainer: Trainer, compiled: bool = True) -> None:
        config, device = trainer.config, trainer.device
        torch.manual_seed(config.seed)
        info = trainer.loaders.info
        model = build_model(describe_model(config, info))
        self.module = Classifier(model, info.mean, info.std)
        self.module.to(device)
        self.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = build_optimizer(config.optimizer, self.module)
        dtype = precision(config, device)
        self.autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
        if compiled:
            self.module.compile(dynamic=False)

    def step(self, batch: Batch) -> Tensor:
        with self.autocast:
            loss, _ = self.module(*batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss


class Ours:
    """A trainer's own step: masks, DeepSpeed engine and all, but no records."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        if trainer.monitor:
            trainer.monitor.screen.close()  # nor a bar or lines among the benchmark's

    def step(self, batch: Batch) -> Tensor:
        return self.steps(iter([batch]))

    def steps(self, batches: Iterator[Batch]) -> Tensor:
        self.trainer.acdc.before_step()
        return self.trainer.train_batch(batches)


def _noise_of(network: Network, folder: Path, num_images: int) -> Path:
    """CIFAR's binary files with noise in them: as many images as an epoch needs, a few for testing."""
    variant = CIFAR100 if "cifar100" in network.recipe else CIFAR10
    root = folder / variant.binary_folder
    root.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for names, count in ((variant.binary["train"], num_images), (variant.binary["test"], 16)):
        for name in names:
            shape = (math.ceil(count / len(names)), variant.label_bytes + PIXELS)
            records = random.integers(0, 256, shape, dtype=np.uint8)
            records[:, : variant.label_bytes] %= variant.num_classes
            (root / name).write_bytes(records.tobytes())
    return folder
