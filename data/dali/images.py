"""Encoded images through DALI: what files and packed images have in common.

An image that cannot be decoded never breaks a batch: another one, which depends on its place alone, stands in
for it in training; in evaluation its place does not count. `on_bad` is called once for each image. The
drawn window alone decides: a truncated image serves crops above its damage, whatever was met before."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data.dali.augment import Augmenter
from data.dali.decode import Decoder, DeviceJpeg
from data.dali.pipeline import PREFETCH, DaliLoader, dense, reason
from data.loader import Batch
from data.stream import Stream

Position = tuple[int, int]  # (epoch, batch)
_IMAGES = (("UINT8", ""), ("INT64", ""))
_CROPS = (("FLOAT", ""), ("FLOAT", ""), ("FLOAT", ""), ("INT32", ""), ("FLOAT", ""))


class DaliImageLoader(DaliLoader):
    """Batches as `stream` draws them, on `device`. See data.loader.Loader. A source of images defines
    _images, _encoded and _names.

    decode_on: "cpu", or "gpu" for the device's JPEG decoder, which `jpeg` sets up. on_bad: called with the
    name of an image that cannot be decoded and the reason; what it raises ends the run. evaluation: (resize,
    size): the shorter side resized, and a crop from the centre, as torchvision evaluates; None for the random
    resized crops, flips and operations of a data.crops.CropStream.
    """

    def __init__(
        self,
        stream: Stream,
        device: torch.device,
        num_threads: int,
        decode_on: str,
        on_bad: Callable[[str, str], None],
        evaluation: tuple[int, int] | None = None,
        jpeg: DeviceJpeg | None = None,
    ) -> None:
        super().__init__(stream, device, num_threads, in_thread=device.type == "cpu")
        self.augmenter = Augmenter(stream.augment, device)
        self.INPUTS = _IMAGES if evaluation else (*_IMAGES, *_CROPS, *self.augmenter.inputs)
        self.decoder = Decoder(device, decode_on, jpeg or DeviceJpeg())
        self.on_bad = on_bad
        self.evaluation = evaluation
        self._skips: dict[tuple[int, int, int], int] = {}  # (epoch, batch, place in it) -> images that failed
        self._told: set[str] = set()

    @abstractmethod
    def _images(self, position: Position, draw: Any) -> tuple[list[NDArray[np.uint8]], NDArray[np.int64]]:
        """What _encoded takes, and the labels, for a batch; where images failed before, of replacements."""

    @abstractmethod
    def _encoded(self, dali: Any, images: Any) -> Any:
        """The node of encoded images."""

    @abstractmethod
    def _names(self, position: Position, draw: Any) -> list[str]:
        """Of the images that _images gives."""

    def _feed(self, position: Position, draw: Any) -> tuple[Any, ...]:
        images, labels = self._images(position, draw)
        if self.evaluation:
            return images, labels
        sizes = np.full((len(images), 2), draw.size, np.float32)
        drawn = self.augmenter.feed(draw, draw.size, draw.size)
        return images, labels, draw.area, draw.ratio, draw.place, draw.flip, sizes, *drawn

    def _graph(self, dali: Any, *inputs: Any) -> tuple[Any, ...]:
        images, labels, *crop = inputs
        encoded = self._encoded(dali, images)
        labels = labels.gpu() if self.decoder.on_gpu else labels
        if self.evaluation:
            return labels, *self.decoder.evaluation(dali, encoded, *self.evaluation)
        area, ratio, place, flip, size, *drawn = crop
        outputs = self.decoder.training(dali, encoded, (area, ratio, place), flip, size)
        return labels, *self.augmenter.graph(dali, outputs, drawn)

    def _batch(self, outputs: Sequence[Any]) -> Batch:
        labels, *images = outputs
        if self.evaluation:
            return Batch(self.decoder.evaluation_batch(images, self.evaluation[1]), dense(labels))
        drawn, crops = self.augmenter.taken(images)
        return Batch(self.augmenter.apply(self.decoder.training_batch(crops), drawn), dense(labels))

    def _next(self) -> Batch:
        while True:
            try:
                return super()._next()
            except RuntimeError:
                if not self._skip_failing():
                    raise
                self._start(*self.position)

    def _start(self, epoch: int, start: int) -> None:
        self._skips = {place: count for place, count in self._skips.items() if place[:2] >= (epoch, start)}
        super()._start(epoch, start)

    def _skip_failing(self) -> bool:
        """Find what fails in the batches under way, and replace it from now on. False: nothing does."""
        position, found, trial = self.position, False, _Trial(self)
        for _ in range(PREFETCH + 1):
            draw = self.stream.draw(*position)
            failing = self._failing(trial, self._feed(position, draw))
            names = self._names(position, draw) if failing else []
            for i, why in failing.items():
                place = (*position, i)
                self._skips[place] = self._skips.get(place, 0) + 1
                if names[i] not in self._told:
                    self._told.add(names[i])
                    self.on_bad(names[i], why)
            found = found or bool(failing)
            position = self.after(position)
        return found

    def serialize_for_trial(self) -> bytes:
        """The same pipeline, decoding on the CPU, for `deserialize`."""
        decoder, self.decoder = self.decoder, Decoder(self.device, "cpu", self.decoder.jpeg)
        try:
            return bytes(self._fed_by_name().serialize())
        finally:
            self.decoder = decoder

    def _failing(self, trial: _Trial, inputs: tuple[Any, ...]) -> dict[int, str]:
        """The rows of a batch's inputs that cannot be decoded, and why."""
        return trial.failing(inputs, list(range(self.stream.batch_size)))


class _Trial:
    """Tries images out, in a pipeline of its own until that has met a bad one: then it is of no more use. It
    decodes on the CPU, as a device's decoder does with what it refuses itself: what that refuses of a whole
    batch, it may take of half of one, where others of its engines get it."""

    def __init__(self, loader: DaliImageLoader) -> None:
        self._loader, self._serialized = loader, loader.serialize_for_trial()
        self._pipeline: Any = None

    def failing(self, inputs: tuple[Any, ...], rows: list[int]) -> dict[int, str]:
        """The rows that cannot be decoded, and why: all are tried, and halves where that fails."""
        self._pipeline = self._pipeline or self._loader.deserialize(self._serialized)
        try:
            for i, whole in enumerate(inputs):
                self._pipeline.feed_input(str(i), [whole[row] for row in rows])
            self._pipeline.run()
        except RuntimeError as error:
            self._pipeline = None
            if len(rows) == 1:
                return {rows[0]: reason(str(error))}
            half = len(rows) // 2
            return {**self.failing(inputs, rows[:half]), **self.failing(inputs, rows[half:])}
        return {}
