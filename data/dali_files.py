"""Image files through DALI: read, then what data.dali_decode does.

A file that cannot be decoded never breaks a batch: the next file of the listing stands in for it, in
training; in evaluation its place does not count. `on_bad` is told, once a file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data.crops import ATTEMPTS, CropDraw
from data.dali import PREFETCH, DaliLoader, dense
from data.dali_decode import Decoder
from data.image_files import ImageFiles
from data.loader import PADDING_LABEL, Batch
from data.stream import Draw, Stream


class DaliFileLoader(DaliLoader):
    """Batches of `files` as `stream` draws them, on `device`. See data.loader.Loader.

    decode_on: "cpu", or "gpu" for the device's JPEG decoder. on_bad: called with the relative path of a file
    that cannot be decoded and the reason; what it raises ends the run.
    """

    def __init__(
        self,
        files: ImageFiles,
        stream: Stream[Any],
        device: torch.device,
        num_threads: int,
        decode_on: str,
        on_bad: Callable[[str, str], None],
    ) -> None:
        super().__init__(stream, device, num_threads, in_thread=device.type == "cpu")
        self.files = files
        self.decoder = Decoder(device, decode_on)
        self.on_bad = on_bad
        self.bad: set[int] = set(files.excluded)
        self._paths = _PathBytes(files)

    def fingerprint(self) -> dict[str, Any]:
        return {"backend": "dali", "data": self.files.digest, **self.stream.fingerprint()}

    def _next(self) -> Batch:
        while True:
            try:
                return super()._next()
            except RuntimeError as error:
                found = self._find_bad()
                if not found:
                    raise
                for index, reason in found.items():
                    self.bad.add(index)
                    self.on_bad(self.files.files[index], reason or str(error))
                self._start(*self.position)

    def _find_bad(self) -> dict[int, str]:
        """The files that cannot be decoded among the batches under way, with the reason."""
        position, suspects = self.position, set()
        for _ in range(PREFETCH + 1):
            suspects |= {self.stand_in(int(i)) for i in self.stream.draw(*position).indices if i >= 0}
            position = self.after(position)
        return self._bad_among(sorted(suspects))

    def _bad_among(self, indices: list[int]) -> dict[int, str]:
        """Decode these alone, and halves of them again where that fails: few files are bad."""
        try:
            self.build(iter([self._probe(indices)]), len(indices)).run()
        except RuntimeError as error:
            if len(indices) == 1:
                return {indices[0]: _reason(str(error))}
            half = len(indices) // 2
            return {**self._bad_among(indices[:half]), **self._bad_among(indices[half:])}
        return {}

    def stand_in(self, index: int) -> int:
        """The file itself, or for a bad one the next of the listing that is not. Raises OSError when all are
        bad."""
        if len(self.bad) >= len(self.files):
            raise OSError(f"no image below {self.files.root} can be decoded")
        while index in self.bad:
            index = (index + 1) % len(self.files)
        return index

    def _probe(self, indices: list[int]) -> tuple[Any, ...]:
        """Inputs that decode these files."""
        raise NotImplementedError


class DaliTrainFiles(DaliFileLoader):
    """Random resized crops and flips, as a data.crops.CropStream draws them."""

    INPUTS = (
        ("UINT8", ""),
        ("INT64", ""),
        ("FLOAT", ""),
        ("FLOAT", ""),
        ("FLOAT", ""),
        ("INT32", ""),
        ("FLOAT", ""),
    )

    def _feed(self, draw: CropDraw) -> tuple[Any, ...]:
        indices = [self.stand_in(int(index)) for index in draw.indices]
        sizes = np.full((len(indices), 2), draw.size, np.float32)
        labels = self.files.labels[indices]
        return self._paths[indices], labels, draw.area, draw.ratio, draw.place, draw.flip, sizes

    def _probe(self, indices: list[int]) -> tuple[Any, ...]:
        ones = np.ones((len(indices), ATTEMPTS), np.float32)  # whole images
        zeros = np.zeros((len(indices), 2), np.float32)
        return self._feed(CropDraw(np.array(indices), ones, ones, zeros, zeros[:, 0].astype(np.int32), 8))

    def _graph(self, dali: Any, *inputs: Any) -> tuple[Any, ...]:
        paths, labels, area, ratio, place, flip, size = inputs
        encoded = dali.fn.io.file.read(paths)
        images = self.decoder.training(dali, encoded, (area, ratio, place), flip, size)
        return labels.gpu() if self.decoder.on_gpu else labels, *images

    def _batch(self, outputs: Sequence[Any]) -> Batch:
        labels, *images = outputs
        return Batch(self.decoder.training_batch(images), dense(labels))


class DaliEvalFiles(DaliFileLoader):
    """The shorter side resized to `resize`, and a crop of `size` from the centre: torchvision's
    evaluation."""

    INPUTS = (("UINT8", ""), ("INT64", ""))

    def __init__(self, *arguments: Any, resize: int, size: int) -> None:
        super().__init__(*arguments)
        self.resize, self.size = resize, size

    def _feed(self, draw: Draw) -> tuple[Any, ...]:
        counts = np.array([index >= 0 and index not in self.bad for index in draw.indices])
        indices = [self.stand_in(max(int(index), 0)) for index in draw.indices]
        return self._paths[indices], np.where(counts, self.files.labels[indices], PADDING_LABEL)

    def _probe(self, indices: list[int]) -> tuple[Any, ...]:
        return self._paths[indices], np.zeros(len(indices), np.int64)

    def _graph(self, dali: Any, *inputs: Any) -> tuple[Any, ...]:
        paths, labels = inputs
        encoded = dali.fn.io.file.read(paths)
        images = self.decoder.evaluation(dali, encoded, self.resize, self.size)
        return labels.gpu() if self.decoder.on_gpu else labels, *images

    def _batch(self, outputs: Sequence[Any]) -> Batch:
        labels, *images = outputs
        return Batch(self.decoder.evaluation_batch(images, self.size), dense(labels))


def _reason(message: str) -> str:
    """What is wrong, out of DALI's report on where it met it."""
    lines = [line.strip() for line in message.partition("encountered:")[2].splitlines() if line.strip()]
    return lines[0] if lines else message.partition("\n")[0]


class _PathBytes:
    """Absolute paths as the bytes that DALI takes, made as they are needed."""

    def __init__(self, files: ImageFiles) -> None:
        self._files = files
        self._root = os.fsencode(files.root) + b"/"

    def __getitem__(self, indices: list[int]) -> list[NDArray[np.uint8]]:
        names = (self._root + self._files.files[index].encode() for index in indices)
        return [np.frombuffer(name, np.uint8) for name in names]
