"""Image files through DALI: read, then what data.dali_decode does.

A file that cannot be decoded never breaks a batch: the next file of the listing stands in for it, in
training; in evaluation its place does not count. `on_bad` is told, once a file. What decides is the drawn
window alone: a truncated file serves crops above its damage, whatever was met before."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data.crops import CropDraw
from data.dali import PREFETCH, DaliLoader, dense, reason
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
        self._paths = _PathBytes(files)
        self._skips: dict[tuple[int, int, int], int] = {}  # (epoch, batch, place in it) -> files that failed
        self._told: set[int] = set()

    def fingerprint(self) -> dict[str, Any]:
        return {"backend": "dali", "data": self.files.digest, **self.stream.fingerprint()}

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
        """Find what fails in the batches under way; from now on the next file stands in there. False: nothing
        does."""
        position, found = self.position, False
        for _ in range(PREFETCH + 1):
            draw = self.stream.draw(*position)
            files = self.files_at(position, draw.indices)
            failing = self._failing(self._feed(position, draw), list(range(len(files))))
            if len(failing) == len(files) and not any(self.files.path(file).exists() for file in files):
                first = self.files.path(files[0])
                raise OSError(f"no file of a whole batch is there, such as {first}: a lost mount?")
            for i, why in failing.items():
                place = (*position, i)
                self._skips[place] = self._skips.get(place, 0) + 1
                if files[i] not in self._told:
                    self._told.add(files[i])
                    self.on_bad(self.files.files[files[i]], why)
            found = found or bool(failing)
            position = self.after(position)
        return found

    def _failing(self, inputs: tuple[Any, ...], rows: list[int]) -> dict[int, str]:
        """The rows of a batch's inputs that cannot be decoded, and why: try all, and halves where that
        fails."""
        part = tuple([whole[row] for row in rows] for whole in inputs)
        try:
            self.build(iter([part]), len(rows)).run()
        except RuntimeError as error:
            if len(rows) == 1:
                return {rows[0]: reason(str(error))}
            half = len(rows) // 2
            return {**self._failing(inputs, rows[:half]), **self._failing(inputs, rows[half:])}
        return {}

    def files_at(self, position: tuple[int, int], indices: NDArray[np.int64]) -> list[int]:
        """The files for the places of a batch: the drawn ones, or of the listing the next that is neither
        excluded nor failed there. For padding, the first file. Raises OSError where none is left."""
        files = []
        for i, index in enumerate(indices.tolist()):
            file, skip = max(index, 0), self._skips.get((*position, i), 0)
            if skip >= len(self.files) - len(self.files.excluded):
                raise OSError(f"no image below {self.files.root} can be decoded")
            while skip or file in self.files.excluded:
                skip -= file not in self.files.excluded
                file = (file + 1) % len(self.files)
            files.append(file)
        return files


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

    def _feed(self, position: tuple[int, int], draw: CropDraw) -> tuple[Any, ...]:
        files = self.files_at(position, draw.indices)
        sizes = np.full((len(files), 2), draw.size, np.float32)
        labels = self.files.labels[files]
        return self._paths[files], labels, draw.area, draw.ratio, draw.place, draw.flip, sizes

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

    def _feed(self, position: tuple[int, int], draw: Draw) -> tuple[Any, ...]:
        files = self.files_at(position, draw.indices)
        counts = np.array(files) == draw.indices  # neither padding nor standing in
        return self._paths[files], np.where(counts, self.files.labels[files], PADDING_LABEL)

    def _graph(self, dali: Any, *inputs: Any) -> tuple[Any, ...]:
        paths, labels = inputs
        encoded = dali.fn.io.file.read(paths)
        images = self.decoder.evaluation(dali, encoded, self.resize, self.size)
        return labels.gpu() if self.decoder.on_gpu else labels, *images

    def _batch(self, outputs: Sequence[Any]) -> Batch:
        labels, *images = outputs
        return Batch(self.decoder.evaluation_batch(images, self.size), dense(labels))


class _PathBytes:
    """Absolute paths as the bytes that DALI takes, made as they are needed."""

    def __init__(self, files: ImageFiles) -> None:
        self._files = files
        self._root = os.fsencode(files.root) + b"/"

    def __getitem__(self, indices: list[int]) -> list[NDArray[np.uint8]]:
        names = (self._root + os.fsencode(self._files.files[index]) for index in indices)
        return [np.frombuffer(name, np.uint8) for name in names]
