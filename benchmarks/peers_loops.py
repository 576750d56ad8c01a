"""Training loops as users write them, that benchmarks.peers measures ours against. Pure PyTorch, one rank.

plain: an uncompiled model, masks of torch.nn.utils.prune, SGD, torchvision's usual transforms. tuned: what
somebody writes today who knows the field: uint8 images in channels_last from the workers on; normalisation,
model and loss compiled as one graph; fused SGD; masks multiplied into the weights after each step. Its
process keeps freed memory, too: benchmarks.peers sets the variables for it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import prune
from torch.utils.data import DataLoader, Dataset, RandomSampler

from benchmarks.shared.models import IN_EPOCH, Network
from data.datasets.imagenet import MEAN, STD
from data.torchvision_import import import_torchvision, import_transforms
from trainer.config.load import load_config
from trainer.engine import missing_for_compilation, precision

Step = Callable[[Tensor, Tensor], Tensor]  # (images, labels) -> loss
SPARSITY = 0.9
# A worker a core is what a DataLoader itself suggests, and what most people take. On two cores one would keep
# up with the model, but a second costs nothing: workers sleep while their read-ahead is full, and what they
# decode is the same. More than eight a GPU are rarely of use, and each reads ahead.
WORKERS = min(8, len(os.sched_getaffinity(0)))
AHEAD = 2  # batches of each worker: DataLoader's default prefetch_factor


def loop(who: str, network: Network, folder: Path, steps: int, device: torch.device) -> Callable[[], Tensor]:
    """The step of the plain or the tuned loop, over data of its own, for `steps` steps at most.

    All are one epoch, with what is read ahead behind them, shuffled again and again: the end of an epoch,
    where workers begin afresh, is as rare in ImageNet as here."""
    tuned = who == "tuned"
    images = images_of(
        network, folder, device, (tuned_transform if tuned else plain_transform)(network.of_files)
    )
    batch = network.batch(device)
    loader = DataLoader(
        images,
        batch,
        sampler=RandomSampler(images, num_samples=batch * (steps + WORKERS * AHEAD)),
        num_workers=WORKERS,
        prefetch_factor=AHEAD,
        persistent_workers=True,
        pin_memory=device.type == "cuda",
        collate_fn=stack if tuned else None,
    )
    batches = iter(loader)
    step = (tuned_step if tuned else plain_step)(network.model(), network, device)
    return lambda: step(*(part.to(device, non_blocking=True) for part in next(batches)))


def plain_step(model: nn.Module, network: Network, device: torch.device) -> Step:
    """Of images (N, 3, H, W), float32."""
    model.to(device)
    layers = [(layer, "weight") for layer in _prunable(model)]
    prune.global_unstructured(layers, pruning_method=prune.L1Unstructured, amount=SPARSITY)
    optimizer = _sgd(network, model)
    autocast = _autocast(network, device)

    def step(images: Tensor, labels: Tensor) -> Tensor:
        with autocast:
            loss = functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        return loss

    return step


def tuned_step(model: nn.Module, network: Network, device: torch.device) -> Step:
    """Of images (N, H, W, 3), uint8."""
    normalised = Normalised(model).to(device)
    # before the first gradient exists: fused SGD on a CPU needs weights and gradients of the same strides
    normalised.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    weights = [layer.weight for layer in _prunable(model)]
    masks = keep_masks(weights, SPARSITY)
    optimizer = _sgd(network, model, fused=True)
    autocast = _autocast(network, device)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch._inductor.config.force_layout_optimization = True  # as ours, see trainer.engine
    if missing_for_compilation(device.type) is None:  # else ours runs uncompiled, too
        normalised.compile(dynamic=False)

    def drop() -> None:
        with torch.no_grad():
            torch._foreach_mul_(weights, masks)

    def step(images: Tensor, labels: Tensor) -> Tensor:
        with autocast:
            loss: Tensor = normalised(images.permute(0, 3, 1, 2), labels)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        drop()
        return loss

    drop()
    return step


class Normalised(nn.Module):
    """uint8 images -> normalised -> model -> mean loss."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", 255 * torch.tensor(MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(STD).view(1, 3, 1, 1))

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(self.model((images - self.mean) / self.std), labels)


def keep_masks(weights: list[nn.Parameter], sparsity: float) -> list[Tensor]:
    """1 for the largest weights over all layers, 0 for the others, in the weights' type and memory."""
    magnitudes = torch.cat([weight.detach().abs().flatten() for weight in weights])
    threshold = magnitudes.kthvalue(round(sparsity * len(magnitudes))).values
    return [(weight.detach().abs() > threshold).to(weight.dtype) for weight in weights]


def _prunable(model: nn.Module) -> list[Any]:
    return [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]


def _sgd(network: Network, model: nn.Module, fused: bool | None = None) -> torch.optim.SGD:
    """The recipe's optimizer, with a rate at which noise does no harm."""
    settings = load_config(network.recipe, []).optimizer
    keywords = settings.model_dump(include={"momentum", "weight_decay", "nesterov"})
    return torch.optim.SGD(model.parameters(), lr=1e-3, fused=fused, **keywords)


def _autocast(network: Network, device: torch.device) -> torch.autocast:
    """To the precision that ours has there."""
    dtype = precision(load_config(network.recipe, network.overrides), device)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def plain_transform(of_files: bool) -> Callable[[Any], Tensor]:
    """From a Pillow image, or an array, to (3, H, W), float32, normalised."""
    transforms = import_torchvision().transforms
    if of_files:
        start = [transforms.RandomResizedCrop(224)]
    else:
        start = [transforms.ToPILImage(), transforms.RandomCrop(32, padding=4)]
    ending = [transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    return transforms.Compose([*start, *ending])


def tuned_transform(of_files: bool) -> Callable[[Any], Tensor]:
    """From a Pillow image, or an array, to (3, H, W), uint8."""
    transforms = import_transforms()
    if of_files:
        # behind PILToTensor images lie in channels_last memory, which torchvision resizes fastest
        start = [transforms.PILToTensor(), transforms.RandomResizedCrop(224, antialias=True)]
    else:
        start = [_channels_first, transforms.RandomCrop(32, padding=4)]
    return transforms.Compose([*start, transforms.RandomHorizontalFlip()])


def images_of(
    network: Network, folder: Path, device: torch.device, transform: Callable[[Any], Tensor]
) -> Any:
    if network.of_files:
        datasets = import_torchvision().datasets  # all of ImageNet's classes, images of the first ones alone
        return datasets.ImageFolder(str(folder / "images" / "train"), transform, allow_empty=True)
    return Arrays(IN_EPOCH * network.batch(device), transform)


class Arrays(Dataset[tuple[Any, int]]):
    """As torchvision's CIFAR: arrays of (32, 32, 3), each made into an image when asked for."""

    def __init__(self, count: int, transform: Callable[[Any], Any]) -> None:
        self.images = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(self.images[index]), index % 10


def _channels_first(pixels: Any) -> Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1)


def stack(samples: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    """(N, H, W, 3), uint8: seen as (N, 3, H, W) it is channels_last without a copy."""
    images, labels = zip(*samples, strict=True)
    return torch.stack([image.permute(1, 2, 0) for image in images]), torch.tensor(labels)
