"""A network that trains in milliseconds, and what the tests of what a run computes share.

As a model of recipes it has the name "small": see the fixture small_net, and rank_results.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from data.datasets import fashion_mnist
from tests.trainer.runs import tiny
from trainer.checkpoints.saved_model import load_model
from trainer.models.dropout import Dropout


class SmallNet(nn.Module):
    """Two convolutions and a linear layer. norm: BatchNorm after the convolutions. dropout: between them."""

    def __init__(
        self, num_classes: int, in_channels: int = 1, norm: bool = False, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 8, 3, 2, padding=1)
        self.bn1 = nn.BatchNorm2d(8) if norm else nn.Identity()
        self.dropout = Dropout(dropout)
        self.conv2 = nn.Conv2d(8, 16, 3, 2, padding=1)
        self.bn2 = nn.BatchNorm2d(16) if norm else nn.Identity()
        self.fc = nn.Linear(16, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(functional.relu(self.bn1(self.conv1(x))))
        x = functional.relu(self.bn2(self.conv2(x)))
        return self.fc(x.mean((2, 3)))


WHOLE = "{norm: true, dropout: 0.3}"  # arguments of a network with all that differs between ranks


def small(data: Path, run_root: Path, arguments: str = "{}", *overrides: str) -> list[str]:
    """The key=value arguments of a run of SmallNet: `arguments` are its own, two short epochs of three
    steps."""
    return [
        *tiny(data, run_root)[1:],
        "model.name=small",
        f"model.arguments={arguments}",
        "epochs=2",
        "steps_per_epoch=3",
        "data.eval_batch_size=40",  # 150 test images: several batches, the last one incomplete
        "sparsity.schedule=dense 1, sparse 1",
        "log.every=1st",
        *overrides,
    ]


def evaluated_by_hand(folder: Path, data: Path) -> dict[str, float]:
    """Loss, top1 and top5 of a saved model on the test images, with nothing of ours but the file."""
    model, info = load_model(folder)
    arrays = fashion_mnist.load(data, "test")
    images = torch.tensor(arrays.images).permute(0, 3, 1, 2).double() / 255
    labels = torch.tensor(arrays.labels)
    mean, std = (torch.tensor(info["model"][key]).view(1, -1, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        logits = model.double().eval()((images - mean) / std)
    right = logits.argsort(1, descending=True)[:, :5] == labels[:, None]
    return {
        "loss": functional.cross_entropy(logits, labels).item(),
        "top1": 100 * right[:, 0].double().mean().item(),
        "top5": 100 * right.any(1).double().mean().item(),
    }


def buffers(module: nn.Module) -> dict[str, Any]:
    return {name: buffer.detach().clone() for name, buffer in module.named_buffers()}
