"""FLOPs of a run: inference at the size of evaluation's images, training at the size of each epoch's."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from sparsity import ModelFlops, count_flops
from sparsity.flops import TRAINING_FACTOR, Call
from trainer.checkpoints.state import Position
from trainer.config.data import DataConfig, ImageNetData


@dataclass(frozen=True)
class RunFlops:
    """inference: at evaluation's size. sizes: (epoch, FLOPs of an image from then on) pairs in rising order,
    the first for epoch 0."""

    inference: ModelFlops
    sizes: tuple[tuple[int, ModelFlops], ...]

    @classmethod
    def count(cls, model: nn.Module, data: DataConfig, shape: tuple[int, int, int]) -> RunFlops:
        """shape: of evaluation's images, (channels, height, width); in-memory images are trained on in the
        same. Raises ValueError for a shape that the model does not take."""
        shapes = [(0, shape)]
        if isinstance(data, ImageNetData):
            shapes = [(epoch, (shape[0], side, side)) for epoch, side in data.sizes]
        distinct = dict.fromkeys([shape, *(trained for _, trained in shapes)])
        counted = {each: _count(model, each) for each in distinct}
        return cls(counted[shape], tuple((epoch, counted[trained]) for epoch, trained in shapes))

    def at(self, epoch: int) -> ModelFlops:
        """Of an image that the epoch trains on."""
        return next(flops for begin, flops in reversed(self.sizes) if begin <= epoch)

    def calls(self) -> dict[str, list[Call]]:
        """Layer -> its calls for one image, at every size that is trained on."""
        found: dict[str, list[Call]] = {}
        for _, flops in self.sizes:
            for layer in flops.layers:
                found.setdefault(layer.name, []).extend(layer.calls)
        return found

    def recount(self, position: Position, num_images: int) -> None:
        """Put right the FLOPs of a checkpoint without dense_training_flops: they were counted at evaluation's
        size, of layers' calls alone. The share that masks saved is taken over to the sizes trained on.
        num_images: of an epoch."""
        layers, images = self.inference.layers, num_images * position.epoch
        uncounted = self.inference.products + sum(layer.flops() for layer in layers if not layer.calls)
        dense = TRAINING_FACTOR * (self.inference.forward() - uncounted) * images
        saved = (dense - position.training_flops) / (self.inference.training() * images)
        position.dense_training_flops = num_images * sum(
            self.at(epoch).training() for epoch in range(position.epoch)
        )
        position.training_flops = (1 - saved) * position.dense_training_flops


def _count(model: nn.Module, shape: tuple[int, int, int]) -> ModelFlops:
    try:
        return count_flops(model, shape)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ValueError(f"it does not take images of shape {shape}: {error}") from error
