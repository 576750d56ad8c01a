"""Image files through DALI: read, decode only the crop's window, resize, flip.

A file that cannot be decoded never breaks a batch: the next file of the listing stands in for it, in
training; in evaluation its place does not count. `on_bad` is told, once a file."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data.crops import ATTEMPTS, RATIOS, CropDraw
from data.dali import PREFETCH, DaliLoader
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
        super().__init__(stream, device, num_threads)
        self.files = files
        self.decode_on = decode_on
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

    def _graph(self, dali: Any, *inputs: Any) -> tuple[Any, Any]:
        paths, labels, area, ratio, place, flip, size = inputs
        fn = dali.fn
        encoded = fn.io.file.read(paths)
        images = crop_window(dali, encoded, area, ratio, place, size, self.decode_on)
        images, labels = _on_device(self, images, labels)
        return fn.flip(images, horizontal=flip), labels


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

    def _graph(self, dali: Any, *inputs: Any) -> tuple[Any, Any]:
        paths, labels = inputs
        encoded = dali.fn.io.file.read(paths)
        images = decode_whole(dali, encoded, self.resize, self.size, self.decode_on)
        return _on_device(self, images, labels)


def crop_window(dali: Any, encoded: Any, area: Any, ratio: Any, place: Any, size: Any, decode_on: str) -> Any:
    """A node of training images, HWC and uint8: the drawn window (see data.crops), resized to `size`."""
    fn, types = dali.fn, dali.types
    start, shape = _window(dali, encoded, area, ratio, place)
    images = fn.decoders.image_slice(
        encoded,
        start,
        shape,
        axes=(0, 1),
        device=_decoder(decode_on),
        output_type=types.RGB,
        adjust_orientation=False,  # the training sets' labels and figures come from images as stored
    )
    return fn.resize(images, size=size, interp_type=types.INTERP_LINEAR, antialias=True)


def decode_whole(dali: Any, encoded: Any, resize: int, size: int, decode_on: str) -> Any:
    """A node of evaluation images, HWC and uint8: data.crops.central in DALI's terms."""
    fn, types = dali.fn, dali.types
    height_width = fn.peek_image_shape(encoded, adjust_orientation=False)[0:2]
    # whole numbers, so that the division below is exact and rounds down as torchvision's does
    height_width = fn.cast(height_width, dtype=types.INT32)
    new = height_width * resize // fn.reductions.min(height_width)
    images = fn.decoders.image(
        encoded, device=_decoder(decode_on), output_type=types.RGB, adjust_orientation=False
    )
    images = fn.resize(
        images, size=fn.cast(new, dtype=types.FLOAT), interp_type=types.INTERP_LINEAR, antialias=True
    )
    # half of an odd margin rounds to the even neighbour, as Python's round does in torchvision
    margin = new - size
    start = margin // 2 + (margin % 2) * (margin // 2 % 2)
    return fn.slice(images, start, (size, size), axes=(0, 1))


def _window(dali: Any, encoded: Any, area: Any, ratio: Any, place: Any) -> tuple[Any, Any]:
    """data.crops.window in DALI's terms: nodes of (top, left) and (height, width), int32."""
    fn, math, types = dali.fn, dali.math, dali.types

    def number(node: Any) -> Any:
        return fn.cast(node, dtype=types.FLOAT)

    shape = number(fn.peek_image_shape(encoded, adjust_orientation=False))
    h, w = shape[0], shape[1]
    pixels = h * w * area
    widths = math.floor(math.sqrt(pixels * ratio) + 0.5)
    heights = math.floor(math.sqrt(pixels / ratio) + 0.5)
    fits = (widths <= w) & (heights <= h)
    # the first attempt that fits has the highest rank
    ranks = number(fits) * types.Constant(np.arange(ATTEMPTS, 0, -1), dtype=types.FLOAT)
    best = fn.reductions.max(ranks)
    chosen = number((ranks == best) & fits)
    any_fits = number(best > 0)
    none_fits = 1 - any_fits
    narrowest, widest = RATIOS
    ch = any_fits * fn.reductions.sum(heights * chosen)
    ch = ch + none_fits * math.min(h, math.floor(w / narrowest + 0.5))
    cw = any_fits * fn.reductions.sum(widths * chosen)
    cw = cw + none_fits * math.min(w, math.floor(h * widest + 0.5))
    top = any_fits * math.floor(place[0] * (h - ch + 1)) + none_fits * math.floor((h - ch) * 0.5)
    left = any_fits * math.floor(place[1] * (w - cw + 1)) + none_fits * math.floor((w - cw) * 0.5)
    return fn.cast(fn.stack(top, left), dtype=types.INT32), fn.cast(fn.stack(ch, cw), dtype=types.INT32)


def _decoder(decode_on: str) -> str:
    return "mixed" if decode_on == "gpu" else "cpu"


def _on_device(loader: DaliFileLoader, images: Any, labels: Any) -> tuple[Any, Any]:
    if loader.device.type != "cuda":
        return images, labels
    return (images if loader.decode_on == "gpu" else images.gpu()), labels.gpu()


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
