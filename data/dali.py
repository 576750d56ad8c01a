"""NVIDIA DALI as the backend: batches of in-memory images, cropped and flipped, uint8 and channels_last, no
copies.

On a GPU the raw batch is sent there and augmented there; without one the same pipeline runs on the CPU.
Batches are prepared ahead in DALI's own threads. Pixels stay uint8: normalising on the device, fused with the
first layers, moves a quarter of the bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.utils.dlpack

from data.arrays import ImageArrays
from data.loader import PADDING_LABEL, Batch
from data.stream import Stream

PREFETCH = 3  # batches ready ahead; a batch is small next to the model's activations


class DaliArrayLoader:
    """Batches of `arrays` as `stream` draws them, on `device`. See data.loader.Loader.

    Raises ModuleNotFoundError, saying what to install, where DALI is missing.
    """

    def __init__(
        self, arrays: ImageArrays, stream: Stream, device: torch.device, num_threads: int = 1
    ) -> None:
        self.arrays = arrays
        self.stream = stream
        self.device = device
        self.num_threads = num_threads
        self._pipeline: Any = None
        self._position = (-1, -1)  # (epoch, batch) that the pipeline gives next
        _import_dali()

    @property
    def batches_per_epoch(self) -> int:
        return self.stream.batches_per_epoch

    @property
    def num_images(self) -> int:
        return len(self.arrays)

    def fingerprint(self) -> dict[str, Any]:
        return {"backend": "dali", "data": self.arrays.digest, **self.stream.fingerprint()}

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        if self._position != (epoch, start):  # else the pipeline has these batches under way already
            self._position = (epoch, start)
            self._pipeline = _build(self._raw_batches(epoch, start), self)
        while self._position[0] == epoch:
            images, labels = self._run()
            index = self._position[1] + 1
            self._position = (epoch, index) if index < self.batches_per_epoch else (epoch + 1, 0)
            yield Batch(images.permute(0, 3, 1, 2), labels)

    def _run(self) -> tuple[torch.Tensor, ...]:
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        return tuple(
            torch.utils.dlpack.from_dlpack(output.as_tensor()) for output in self._pipeline.run(stream)
        )

    def _raw_batches(self, epoch: int, start: int) -> Iterator[tuple[np.ndarray, ...]]:
        """Everything from (epoch, start) on, without end: the pipeline reads ahead into the next epoch."""
        while True:
            for index in range(start, self.batches_per_epoch):
                draw = self.stream.draw(epoch, index)
                labels = np.where(draw.indices < 0, PADDING_LABEL, self.arrays.labels[draw.indices])
                yield self.arrays.images[draw.indices], labels, draw.shift, draw.flip
            epoch, start = epoch + 1, 0


def _build(source: Iterator[tuple[np.ndarray, ...]], loader: DaliArrayLoader) -> Any:
    dali = _import_dali()
    fn, types = dali.fn, dali.types
    on_gpu = loader.device.type == "cuda"
    _, height, width = loader.arrays.shape
    pipeline = dali.Pipeline(
        batch_size=loader.stream.batch_size,
        num_threads=loader.num_threads,
        device_id=(loader.device.index or 0) if on_gpu else None,
        prefetch_queue_depth=PREFETCH,
        exec_dynamic=True,  # outputs stay valid as long as a tensor refers to them: no copy needed
    )
    with pipeline:
        images, labels, shift, flip = fn.external_source(
            source=source,
            num_outputs=4,
            batch=True,
            layout=["HWC", "", "", ""],
            dtype=[types.UINT8, types.INT64, types.INT32, types.INT32],
        )
        if on_gpu:
            images, labels = images.gpu(), labels.gpu()
        images = fn.slice(
            images, shift, (height, width), axes=(0, 1), out_of_bounds_policy="pad", fill_values=0
        )
        images = fn.flip(images, horizontal=flip)
        pipeline.set_outputs(images, labels)
    pipeline.build()
    return pipeline


def _import_dali() -> Any:
    try:
        import nvidia.dali as dali
        import nvidia.dali.fn
        import nvidia.dali.types  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the data pipeline needs NVIDIA DALI: pip install nvidia-dali-cuda130==2.4.0"
        ) from error
    return dali
