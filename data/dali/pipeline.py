"""NVIDIA DALI: a pipeline fed with draws, which gives uint8 batches in channels_last without copies.

On a GPU images are decoded or augmented there; without one the same pipeline runs on the CPU. Pixels stay
uint8: normalising on the device, fused with the first layers, moves a quarter of the bytes.
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.utils.dlpack
from numpy.typing import NDArray
from torch import Tensor

from data.ahead import AheadLoader
from data.loader import Batch
from data.stream import Stream

PREFETCH = 3  # batches ready ahead; a batch is small next to the model's activations


class DaliLoader(AheadLoader):
    """A pipeline over what `_feed` makes of draws. A data set defines INPUTS, _feed, _graph and _batch.

    Raises ModuleNotFoundError, saying what to install, where DALI is missing.
    """

    INPUTS: tuple[tuple[str, str], ...] = ()  # (DALI type, layout) of each input

    def __init__(
        self, stream: Stream, device: torch.device, num_threads: int, in_thread: bool = False
    ) -> None:
        super().__init__(stream, in_thread)
        self.device = device
        self.num_threads = num_threads
        self._pipeline: Any = None
        self._lent = Lent()
        import_dali()

    def _start(self, epoch: int, start: int) -> None:
        dali, source = import_dali(), itertools.starmap(self._feed, self.draws(epoch, start))

        def graph() -> Any:
            inputs = dali.fn.external_source(
                source=source,
                num_outputs=len(self.INPUTS),
                batch=True,
                dtype=[getattr(dali.types, kind) for kind, _ in self.INPUTS],
                layout=[layout for _, layout in self.INPUTS],
            )
            return self._graph(dali, *inputs)

        self._pipeline = self._define(graph, PREFETCH)
        self._pipeline.build()

    def _next(self) -> Batch:
        if self.device.type == "cpu":
            return self._batch(self._pipeline.run())
        self._lent.take_back()
        # what is enqueued on this stream from now on waits for the batch; the host does not
        batch = self._batch(self._pipeline.run(torch.cuda.current_stream(self.device)))
        return self._lent.lend(batch)

    def _fed_by_name(self) -> Any:
        dali = import_dali()

        def graph() -> Any:
            inputs = [
                dali.fn.external_source(name=str(i), dtype=getattr(dali.types, kind), layout=layout)
                for i, (kind, layout) in enumerate(self.INPUTS)
            ]
            return self._graph(dali, *inputs)

        return self._define(graph, 1)

    def _define(self, graph: Callable[[], Any], prefetch: int) -> Any:
        """The pipeline with the outputs of `graph`. DALI's AutoGraph reads it only where it branches."""
        branches = self.stream.augment is not None and self.device.type == "cuda"
        define = import_dali().pipeline_def(graph, enable_conditionals=branches, **self._options(prefetch))
        return define()

    def deserialize(self, serialized: bytes) -> Any:
        """A pipeline that is fed a batch before every run, input i by the name str(i). It is there in a third
        of the time that building its graph takes."""
        pipeline = import_dali().Pipeline.deserialize(serialized, **self._options(1))
        pipeline.build()
        return pipeline

    def _options(self, prefetch: int) -> dict[str, Any]:
        return {
            "batch_size": self.stream.batch_size,
            "num_threads": self.num_threads,
            "device_id": self._device_id(),
            "prefetch_queue_depth": prefetch,
            "exec_dynamic": True,  # outputs stay valid as long as a tensor refers to them: no copy needed
        }

    def _device_id(self) -> int | None:
        if self.device.type != "cuda":
            return None
        return torch.cuda.current_device() if self.device.index is None else self.device.index

    @abstractmethod
    def _feed(
        self, position: tuple[int, int], draw: Any
    ) -> tuple[NDArray[Any] | list[NDArray[np.uint8]], ...]:
        """A batch of each input, for the draw at a position."""

    @abstractmethod
    def _graph(self, dali: Any, *inputs: Any) -> tuple[Any, ...]:
        """The pipeline's output nodes."""

    @abstractmethod
    def _batch(self, outputs: Sequence[Any]) -> Batch:
        """What the outputs are as a batch."""


class Lent:
    """Batches in DALI's memory on a GPU, kept until the device has done what was enqueued with them.

    DALI takes memory back once no tensor refers to it, in the order of its own stream, not of the reader's. A
    host that runs ahead of the device lets go of batches not yet read.
    """

    def __init__(self) -> None:
        self._last: Batch | None = None
        self._in_use: deque[tuple[torch.cuda.Event, Batch]] = deque()

    def lend(self, batch: Batch) -> Batch:
        self._last = batch
        return batch

    def take_back(self) -> None:
        """Once all work on the last batch is enqueued on the current stream: let go of what is done with."""
        if self._last is not None:
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record()
            self._in_use.append((done, self._last))
            self._last = None
        while self._in_use and self._in_use[0][0].query():  # type: ignore[no-untyped-call]
            self._in_use.popleft()


def dense(output: Any) -> Tensor:
    """A DALI output of one shape as one tensor, without a copy."""
    return torch.utils.dlpack.from_dlpack(output.as_tensor())


def reason(message: str) -> str:
    """What is wrong, out of DALI's report on where it met it."""
    lines = [line.strip() for line in message.partition("encountered:")[2].splitlines() if line.strip()]
    return lines[0] if lines else message.partition("\n")[0]


def import_dali() -> Any:
    try:
        import nvidia.dali as dali
        import nvidia.dali.fn
        import nvidia.dali.math
        import nvidia.dali.types  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the data pipeline needs NVIDIA DALI: pip install 'acdc-train[train]'"
        ) from error
    return dali
