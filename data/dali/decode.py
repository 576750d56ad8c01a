"""From encoded images to batches, in DALI's terms: decode only the crop's window, resize, flip.

On a GPU all of it is in the pipeline. Without one DALI decodes and torch resizes: torch's resize of uint8
images with anti-aliasing takes a fraction of DALI's time on a CPU. It runs on one thread; whatever torch
would spread over its threads here (copies, flips) has to wait for cores that decode, and is left to DALI and
numpy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils.dlpack
from torch import Tensor
from torch.nn import functional

from data.crops import ATTEMPTS, RATIOS
from data.dali.pipeline import dense


@dataclass(frozen=True)
class DeviceJpeg:
    """How a device decodes JPEGs. engine_load: share of a batch, from 0 to 1, for its decoder engines, where
    it has some; CUDA kernels decode the rest. width_hint, height_hint: in pixels, of the largest image that
    the engines' memory is allocated for at the start; 0: it grows as images come."""

    engine_load: float = 1.0
    width_hint: int = 0
    height_hint: int = 0

    def options(self) -> dict[str, Any]:
        return {
            # chroma as libjpeg-turbo interpolates it, on the CPU and in Pillow; DALI's default repeats pixels
            "jpeg_fancy_upsampling": True,
            "hw_decoder_load": self.engine_load,
            "preallocate_width_hint": self.width_hint,
            "preallocate_height_hint": self.height_hint,
        }


class Decoder:
    """The part of a pipeline behind the encoded bytes, and what is left to do once it has run.

    decode_on: "cpu", or "gpu" for the device's JPEG decoder, which `jpeg` sets up.
    """

    def __init__(self, device: torch.device, decode_on: str, jpeg: DeviceJpeg) -> None:
        self.on_gpu = device.type == "cuda"
        self.backend = "mixed" if decode_on == "gpu" else "cpu"
        self.jpeg = jpeg

    def fingerprint(self) -> dict[str, Any]:
        """What changes pixels, beside a run on a CPU. Engines and CUDA kernels need not round alike, and the
        load says which image goes where."""
        if not self.on_gpu:
            return {}
        if self.backend == "cpu":
            return {"pixels": "decoded on the CPU, resized on the GPU"}
        return {"pixels": f"decoded and resized on the GPU, decoder_engine_load {self.jpeg.engine_load}"}

    def _options(self, dali: Any) -> dict[str, Any]:
        options = {
            "device": self.backend,
            "output_type": dali.types.RGB,
            "adjust_orientation": False,  # the training sets' labels and figures come from images as stored
        }
        return {**options, **self.jpeg.options()} if self.backend == "mixed" else options

    def training(
        self, dali: Any, encoded: Any, draw: tuple[Any, Any, Any], flip: Any, size: Any
    ) -> tuple[Any, ...]:
        """Output nodes for random crops. draw: area, ratio and place of data.crops, as nodes; size: (side,
        side) of the square that becomes of the window."""
        fn = dali.fn
        start, shape = _window(dali, encoded, *draw)
        images = fn.decoders.image_slice(encoded, start, shape, axes=(0, 1), **self._options(dali))
        if not self.on_gpu:
            return fn.flip(images, horizontal=flip), size
        return (fn.flip(_resize(dali, self._moved(images), size), horizontal=flip),)

    def evaluation(self, dali: Any, encoded: Any, resize: int, size: int) -> tuple[Any, ...]:
        """Output nodes for the central crops of data.crops.central, which tells of resize and size."""
        fn, types = dali.fn, dali.types
        # whole numbers, so that the division below is exact and rounds down as torchvision's does
        old = fn.cast(fn.peek_image_shape(encoded, adjust_orientation=False)[0:2], dtype=types.INT32)
        new = old * resize // fn.reductions.min(old)
        # half of an odd margin rounds to the even neighbour, as Python's round does in torchvision
        margin = new - size
        start = margin // 2 + (margin % 2) * (margin // 2 % 2)
        images = fn.decoders.image(encoded, **self._options(dali))
        if not self.on_gpu:
            return images, new, start
        images = _resize(dali, self._moved(images), fn.cast(new, dtype=types.FLOAT))
        # named, so that both stay on the CPU: a positional constant would be a tensor on the device
        return (fn.slice(images, start=start, shape=(size, size), axes=(0, 1)),)

    def _moved(self, images: Any) -> Any:
        return images if self.backend == "mixed" else images.gpu()

    def training_batch(self, outputs: Sequence[Any]) -> Tensor:
        """(N, 3, side, side), uint8, channels_last, from what the nodes of `training` gave."""
        if self.on_gpu:
            return dense(outputs[0]).permute(0, 3, 1, 2)
        images, sizes = outputs
        side = int(dense(sizes)[0, 0])
        batch = _empty(len(images), side)
        for i, into in enumerate(batch):
            # what functional.interpolate calls, here straight into the batch
            torch.ops.aten._upsample_bilinear2d_aa.out(
                _pixels(images[i]), (side, side), False, out=into[None]
            )
        return batch

    def evaluation_batch(self, outputs: Sequence[Any], size: int) -> Tensor:
        """(N, 3, size, size), uint8, channels_last, from what the nodes of `evaluation` gave."""
        if self.on_gpu:
            return dense(outputs[0]).permute(0, 3, 1, 2)
        images, *where = outputs
        new, starts = (dense(part).tolist() for part in where)
        batch = _empty(len(images), size)
        for i, (into, (height, width), (top, left)) in enumerate(zip(batch, new, starts, strict=True)):
            pixels, new_size = _pixels(images[i]), (height, width)
            resized = functional.interpolate(pixels, new_size, mode="bilinear", antialias=True)
            into.numpy()[:] = resized.numpy()[0, :, top : top + size, left : left + size]
        return batch


def _empty(count: int, side: int) -> Tensor:
    return torch.empty(count, side, side, 3, dtype=torch.uint8).permute(0, 3, 1, 2)


def _pixels(image: Any) -> Tensor:
    """(1, 3, height, width) of a DALI image, HWC and uint8, on the CPU."""
    return torch.utils.dlpack.from_dlpack(image).permute(2, 0, 1)[None]


def _resize(dali: Any, images: Any, size: Any) -> Any:
    return dali.fn.resize(images, size=size, interp_type=dali.types.INTERP_LINEAR, antialias=True)


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
    fits = (widths >= 1) & (widths <= w) & (heights >= 1) & (heights <= h)
    # the first attempt that fits has the highest rank
    ranks = number(fits) * types.Constant(list(range(ATTEMPTS, 0, -1)), dtype=types.FLOAT)
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
