"""BatchNorm statistics taken anew: right after a compression they still describe the dense model."""

from __future__ import annotations

from itertools import islice

import torch
from torch import nn

from data.loader import Loader
from trainer.distributed import ranks


@torch.no_grad()
def recompute_batch_norm(
    classifier: nn.Module, loader: Loader, epoch: int, num_batches: int, autocast: torch.autocast
) -> None:
    """Replace the running statistics of every BatchNorm by the plain average over the first `num_batches`
    training batches of `epoch` on all ranks, passing over further epochs' where one is not enough.

    The pass runs uncompiled and in training mode, dropout included, as the paper's implementation does it;
    that one lets the moving average drift instead of averaging.
    """
    norms = [module for module in classifier.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average
    done = 0
    while done < num_batches:
        for images, labels in islice(loader.epoch(epoch), num_batches - done):
            with autocast:
                classifier.forward(images, labels)
            done += 1
        epoch += 1
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    ranks.average_buffers(classifier)
