"""One contender of benchmarks.peers: python -m benchmarks.peers_worker ours|peer NETWORK FOLDER STEPS

Reads a number of steps from a line of standard input, trains so many, and answers "seconds 1.234".
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import prune

from benchmarks.models import NETWORKS, Network, Ours, short_run
from data.imagenet import MEAN, STD

SPARSITY = 0.9


def main() -> int:
    who, name, folder, steps = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    with contextlib.redirect_stdout(sys.stderr):  # what libraries print is no answer
        make = {"ours": make_ours, "peer": make_peer}[who]
        step = make(NETWORKS[name], Path(folder), int(steps))
        for line in sys.stdin:
            begin = time.perf_counter()
            for _ in range(int(line)):
                step()
            _finish()
            print(f"seconds {time.perf_counter() - begin}", file=answers, flush=True)
    return 0


def make_ours(network: Network, folder: Path, steps: int) -> Callable[[], Any]:
    """The trainer's step, in a compressed phase, over its own data."""
    from trainer import ranks
    from trainer.build import build_trainer

    device = ranks.start()
    batch = network.batch(device)
    files = [f"data.root={folder / 'images'}", "data.backend=dali"]
    overrides = files if network.recipe.startswith("imagenet") else []
    in_epoch = min(steps, _num_images(folder, batch * steps) // batch)
    trainer = build_trainer(
        short_run(network, folder / "ours", f"sparse {steps // in_epoch + 2}", batch, in_epoch, *overrides),
        device,
    )
    ours = Ours(trainer)
    batches = itertools.chain.from_iterable(trainer.loaders.train.epoch(epoch) for epoch in itertools.count())
    return lambda: ours.steps(batches)


def make_peer(network: Network, folder: Path, steps: int) -> Callable[[], Any]:
    """A plain training loop's step."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    classes = 1000 if network.recipe.startswith("imagenet") else 100
    model = _plain_model(network, classes).to(device)
    layers = [(layer, "weight") for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    prune.global_unstructured(layers, pruning_method=prune.L1Unstructured, amount=SPARSITY)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    batches = _endless(_plain_loader(network, folder, network.batch(device), steps, device))
    model.train()

    def step() -> None:
        images, labels = (part.to(device, non_blocking=True) for part in next(batches))
        with autocast:
            loss = functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()

    return step


def _plain_model(network: Network, classes: int) -> nn.Module:
    from trainer.load import load_config
    from trainer.models import get_model

    model = load_config(network.recipe, []).model
    return get_model(model.name, num_classes=classes, **model.arguments)


def _plain_loader(network: Network, folder: Path, batch: int, steps: int, device: torch.device) -> Any:
    from data.torchvision_import import import_torchvision

    torchvision = import_torchvision()
    transforms = torchvision.transforms
    ending = [transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    dataset: Any
    if network.recipe.startswith("imagenet"):
        crop = transforms.RandomResizedCrop(224)
        transform = transforms.Compose([crop, *ending])
        dataset = torchvision.datasets.ImageFolder(str(folder / "images" / "train"), transform)
    else:
        crop = transforms.RandomCrop(32, padding=4)
        dataset = _Pictures(batch * steps, transforms.Compose([crop, *ending]))
    return torch.utils.data.DataLoader(
        dataset,
        batch,
        shuffle=True,
        drop_last=True,
        num_workers=len(os.sched_getaffinity(0)),
        persistent_workers=True,
        pin_memory=device.type == "cuda",
    )


class _Pictures(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """As torchvision's CIFAR: arrays, made into Pillow images one by one."""

    def __init__(self, count: int, transform: Callable[[Any], Tensor]) -> None:
        self.images = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        return self.transform(Image.fromarray(self.images[index])), index % 10


def _endless(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


def _num_images(folder: Path, otherwise: int) -> int:
    """JPEG files to train on, or that many images of noise."""
    return len(list((folder / "images" / "train").glob("*/*.JPEG"))) or otherwise


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    raise SystemExit(main())
