"""In-memory images through DALI: random crops with padding, flips, operations of data.augment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from data.dali.augment import Augmenter
from data.dali.pipeline import DaliLoader, dense
from data.datasets.arrays import ImageArrays
from data.loader import PADDING_LABEL, Batch
from data.stream import Draw, Stream

_INPUTS = (("UINT8", "HWC"), ("INT64", ""), ("INT32", ""), ("INT32", ""))


class DaliArrayLoader(DaliLoader):
    """Batches of `arrays` as `stream` draws them, on `device`. See data.loader.Loader."""

    def __init__(
        self, arrays: ImageArrays, stream: Stream, device: torch.device, num_threads: int = 1
    ) -> None:
        augments_here = stream.augment is not None and device.type == "cpu"
        super().__init__(stream, device, num_threads, in_thread=augments_here)
        self.augmenter = Augmenter(stream.augment, device)
        self.INPUTS = (*_INPUTS, *self.augmenter.inputs)
        self.arrays = arrays

    def fingerprint(self) -> dict[str, Any]:
        return {"backend": "dali", "data": self.arrays.digest, **self.stream.fingerprint()}

    def _feed(self, position: tuple[int, int], draw: Draw) -> tuple[Any, ...]:
        labels = np.where(draw.counts, self.arrays.labels[draw.indices], PADDING_LABEL)
        drawn = self.augmenter.feed(draw, *self.arrays.shape[1:])
        return self.arrays.images[draw.indices], labels, draw.shift, draw.flip, *drawn

    def _graph(self, dali: Any, *inputs: Any) -> tuple[Any, ...]:
        images, labels, shift, flip, *drawn = inputs
        if self.device.type == "cuda":
            images, labels = images.gpu(), labels.gpu()
        channels, *size = self.arrays.shape
        # start and shape named: a positional constant would be a tensor on the device
        pad = {"out_of_bounds_policy": "pad", "fill_values": 0}
        images = dali.fn.slice(images, start=shift, shape=size, axes=(0, 1), **pad)
        images = dali.fn.flip(images, horizontal=flip)
        return labels, *self.augmenter.graph(dali, (images,), drawn, grey=channels == 1)

    def _batch(self, outputs: Sequence[Any]) -> Batch:
        labels, *rest = outputs
        drawn, (images,) = self.augmenter.taken(rest)
        return Batch(self.augmenter.apply(dense(images).permute(0, 3, 1, 2), drawn), dense(labels))
