"""Image files through Pillow, torchvision's transforms and a DataLoader: where DALI does not run, and what it
is measured against.

The same draws as in data.dali.files give the same order, windows, flips and operations; pixels differ by
what two decoders and two resampling filters differ.
"""

from __future__ import annotations

import atexit
import signal
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.ahead import AheadLoader
from data.augment import Augment, apply
from data.crops import CropDraw, central, window
from data.images.files import ImageFiles
from data.images.pixels import to_rgb
from data.loader import PADDING_LABEL, Batch
from data.parent import end_with_parent
from data.stream import Draw, Stream
from data.torchvision_import import import_transforms

GRACE = 20  # seconds that a worker lives on after SIGTERM; the launcher kills after 30


class TorchFileLoader(AheadLoader):
    """Batches of `files` as `stream` draws them, on `device`. See data.loader.Loader.

    num_workers: processes that decode; 0 decodes in this one. on_bad: called with the relative path of a file
    that cannot be decoded and the reason, see data.dali.images. evaluation: (resize, size) of evaluation's
    central crop; None for the random crops of a CropStream.
    """

    def __init__(
        self,
        files: ImageFiles,
        stream: Stream,
        device: torch.device,
        num_workers: int,
        on_bad: Callable[[str, str], None],
        evaluation: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(stream)
        self.files, self.device, self.num_workers, self.on_bad = files, device, num_workers, on_bad
        self.evaluation = evaluation
        self._told: set[int] = set()
        self._batches: Iterator[_Decoded] = iter(())
        # before multiprocessing's own end, which signals workers and waits for them
        atexit.register(_close, weakref.ref(self))

    def fingerprint(self) -> dict[str, Any]:
        return {"backend": "torch", "data": self.files.digest, **self.stream.fingerprint()}

    def _start(self, epoch: int, start: int) -> None:
        self.close()
        self._batches = iter(
            DataLoader(
                _Images(self.files, self.evaluation, self.stream.augment),
                sampler=(draw for _, draw in self.draws(epoch, start)),
                batch_size=None,  # a draw is a batch already
                num_workers=self.num_workers,
                pin_memory=self.device.type == "cuda",
                multiprocessing_context="forkserver" if self.num_workers else None,
                worker_init_fn=_start_worker,
            )
        )

    def close(self) -> None:
        """End the processes."""
        self._batches = iter(())

    def _next(self) -> Batch:
        decoded = next(self._batches)
        for index, reason in decoded.bad:
            if index not in self._told:
                self._told.add(index)
                self.on_bad(self.files.files[index], reason)
        images = decoded.images.to(self.device, non_blocking=True)
        return Batch(images.permute(0, 3, 1, 2), decoded.labels.to(self.device, non_blocking=True))


def _close(loader: weakref.ref[TorchFileLoader]) -> None:
    if (alive := loader()) is not None:
        alive.close()


def _start_worker(_: int) -> None:
    """The launcher signals all processes, and the training process needs its workers until it has saved. They
    end with it, killed or not, or for themselves soon after the signal."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE))


class _Decoded(NamedTuple):
    """images: uint8, (N, H, W, 3). bad: (number of a file that could not be decoded, the reason) each."""

    images: Tensor
    labels: Tensor
    bad: list[tuple[int, str]]


class _Images(Dataset[_Decoded]):
    """draw -> decoded batch; runs in the worker processes."""

    def __init__(
        self, files: ImageFiles, evaluation: tuple[int, int] | None, augment: Augment | None
    ) -> None:
        self.files, self.evaluation, self.augment = files, evaluation, augment

    def __getitem__(self, draw: Any) -> _Decoded:
        bad: list[tuple[int, str]] = []
        make = self._train if self.evaluation is None else self._eval
        images, labels = zip(*(make(draw, i, bad) for i in range(len(draw.indices))), strict=True)
        pixels = torch.stack([image.permute(1, 2, 0) for image in images])
        return _Decoded(pixels, torch.tensor(labels), bad)

    def _train(self, draw: CropDraw, i: int, bad: list[tuple[int, str]]) -> tuple[Tensor, int]:
        functional = import_transforms().functional
        index = int(draw.indices[i])
        for _ in range(len(self.files)):
            if (image := self._decode(index, bad)) is not None:
                crop = window(draw, i, image.shape[1], image.shape[2])
                image = functional.resized_crop(image, *crop, size=[draw.size, draw.size], antialias=True)
                if draw.flip[i]:
                    image = functional.horizontal_flip(image)
                if self.augment:
                    side = draw.size, draw.size
                    magnitudes = self.augment.magnitudes(draw.operations[i], draw.levels[i], *side)
                    image = apply(image, draw.operations[i], magnitudes)
                return image, int(self.files.labels[index]) if draw.counts[i] else PADDING_LABEL
            index = (index + 1) % len(self.files)  # the next of the listing stands in
        raise OSError(f"no image below {self.files.root} can be decoded")

    def _eval(self, draw: Draw, i: int, bad: list[tuple[int, str]]) -> tuple[Tensor, int]:
        assert self.evaluation is not None
        index, size = int(draw.indices[i]), self.evaluation[1]
        image = self._decode(index, bad) if draw.counts[i] else None
        if image is None:
            return torch.zeros(3, size, size, dtype=torch.uint8), PADDING_LABEL
        return central_crop(image, self.evaluation), int(self.files.labels[index])

    def _decode(self, index: int, bad: list[tuple[int, str]]) -> Tensor | None:
        if index in self.files.excluded:
            return None
        try:
            return decode(self.files.path(index))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            bad.append((index, str(error)))
            return None


def decode(path: Path, grey: bool = False) -> Tensor:
    """(3, height, width), or 1 where `grey`, uint8, in channels_last memory: torchvision resizes such tensors
    faster than Pillow resizes its images. Raises what Pillow raises for damaged files, and OSError."""
    # not by its path: Pillow would map the file, with the sides of a turned TIFF exchanged
    with path.open("rb") as file, Image.open(file) as image:
        pixels = to_rgb(image)
    if grey:
        return torch.from_numpy(np.array(Image.fromarray(pixels).convert("L")))[None]
    return torch.from_numpy(pixels).permute(2, 0, 1)


def central_crop(image: Tensor, evaluation: tuple[int, int]) -> Tensor:
    """(channels, size, size) for evaluation (resize, size): its centre, its shorter side resized before."""
    functional = import_transforms().functional
    resize, size = evaluation
    height, width, top, left = central(image.shape[1], image.shape[2], resize, size)
    return functional.crop(functional.resize(image, [height, width], antialias=True), top, left, size, size)
