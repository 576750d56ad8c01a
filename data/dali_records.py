"""Packed images through DALI's own readers, read in sequence.

Every epoch is a pipeline of its own, seeded by (seed, epoch, rank), over the files in an order of its own,
with a shuffle buffer: what comes depends on (epoch, start) alone, as everywhere. A position within an epoch
is reached at once from a state that the pipeline gave there, and otherwise by reading up to it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from data.ahead import AheadLoader
from data.crops import ATTEMPTS, RATIOS, CropStream
from data.dali import PREFETCH, dense, import_dali, reason
from data.dali_decode import Decoder
from data.loader import PADDING_LABEL, Batch
from data.records import RecordFiles
from data.shards import READER_EXTENSIONS
from data.stream import EvalStream

SHUFFLE_BUFFER = 4096  # images a rank holds, encoded, to draw the next one from: about 450 MB of ImageNet
_READER = "records"


class DaliRecordLoader(AheadLoader):
    """See data.loader.Loader. A CropStream for `stream` makes it the training set, an EvalStream the other.

    decode_on: "cpu", or "gpu" for the device's JPEG decoder. first_label: what class 0 has for a number in
    the files. evaluation: (resize, size) of evaluation's central crop."""

    def __init__(
        self,
        records: RecordFiles,
        stream: CropStream | EvalStream,
        device: torch.device,
        num_threads: int,
        decode_on: str,
        num_classes: int,
        first_label: int = 0,
        evaluation: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(stream, in_thread=device.type == "cpu")
        self.records, self.device, self.num_threads = records, device, num_threads
        self.decoder = Decoder(device, decode_on)
        self.num_classes, self.first_label, self.evaluation = num_classes, first_label, evaluation
        self._pipeline: Any = None
        self._epoch = -1  # that the pipeline is of
        self._state: tuple[tuple[int, int], bytes] | None = None  # to start from
        self._places: dict[tuple[int, int], bytes] = {}  # position -> DALI's state there

    def fingerprint(self) -> dict[str, Any]:
        ours = {"backend": "dali", "format": self.records.format, "data": self.records.digest}
        return {**ours, **self.stream.fingerprint(), "shards": self.stream.world_size}

    def state(self) -> dict[str, Any]:
        """This rank's place within the epoch: position, DALI's state there, and its SHA-256, because DALI
        takes most damaged states for good ones. Empty at an epoch's beginning."""
        self.settle()
        state = self._places.get(self.position)
        if state is None or self.position[1] == 0:
            return {}
        content = torch.frombuffer(bytearray(state), dtype=torch.uint8)
        return {"position": self.position, "dali": content, "sha256": hashlib.sha256(state).hexdigest()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Be at the place where `state` was taken. Raises ValueError for a damaged one."""
        if state:
            content = state["dali"].numpy().tobytes()
            if hashlib.sha256(content).hexdigest() != state["sha256"]:
                raise ValueError("the data pipeline's state is damaged: its SHA-256 is not the one beside it")
            epoch, index = state["position"]
            self._state = ((epoch, index), content)

    def _start(self, epoch: int, start: int) -> None:
        known = self._state is not None and self._state[0] == (epoch, start)
        self._pipeline = self._build(epoch, self._state[1] if known and self._state else None)
        self._epoch, self._state = epoch, None
        for _ in range(0 if known else start):
            self._pipeline.run()
        self._places = {(epoch, start): self._pipeline.checkpoint()} if start else {}

    def _next(self) -> Batch:
        epoch, index = self.position
        if self._epoch != epoch:  # an epoch is a pipeline of its own
            self._start(epoch, 0)
        batch = self._run(index)
        # of the batch that was run, which the thread may have run ahead, and of the next
        before = {place: state for place, state in self._places.items() if place == self.position}
        self._places = {**before, self.after(self.position): self._pipeline.checkpoint()}
        return batch

    def _run(self, index: int) -> Batch:
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        try:
            labels, *outputs = self._pipeline.run(stream)
        except RuntimeError as error:
            raise OSError(
                f"an image in {self.records.paths[0].parent} cannot be decoded: {reason(str(error))}; "
                "pack the "
                "images again, after acdc verify-data --exclude"
            ) from error
        numbers = torch.from_numpy(self._numbers(dense(labels).numpy()))
        if self.evaluation is None:
            images = self.decoder.training_batch(outputs)
        else:
            images = self.decoder.evaluation_batch(outputs, self.evaluation[1])
            numbers[self._num_left(index) :] = PADDING_LABEL
        return Batch(images, numbers.to(self.device, non_blocking=True))

    def _numbers(self, labels: Any) -> Any:
        """int64, (N,): classes from what the readers give, decimal digits as text in WebDataset."""
        if self.records.format == "webdataset":
            labels = np.array([int(bytes(row)) for row in labels], np.int64)
        numbers = labels.reshape(-1).astype(np.int64) - self.first_label
        if numbers.min() < 0 or numbers.max() >= self.num_classes:
            raise OSError(
                f"{self.records.paths[0].parent} holds labels from {numbers.min() + self.first_label} to "
                f"{numbers.max() + self.first_label}, which data.first_label={self.first_label} and "
                f"{self.num_classes} classes do not allow: see data.first_label, data.num_classes"
            )
        return numbers

    def _num_left(self, index: int) -> int:
        """Images of this rank's share that are left at batch `index` of evaluation; the reader repeats the
        last."""
        num, world, rank = self.num_images, self.stream.world_size, self.stream.rank
        share = num * (rank + 1) // world - num * rank // world
        return max(0, share - index * self.stream.batch_size)

    def _build(self, epoch: int, state: bytes | None) -> Any:
        dali = import_dali()
        fn = dali.fn
        seed = np.random.SeedSequence((getattr(self.stream, "seed", 0), epoch, self.stream.rank))
        pipeline = dali.Pipeline(
            batch_size=self.stream.batch_size,
            num_threads=self.num_threads,
            device_id=(self.device.index or 0) if self.device.type == "cuda" else None,
            prefetch_queue_depth=PREFETCH,
            exec_dynamic=True,
            seed=int(seed.generate_state(1)[0]),
            enable_checkpointing=True,
            checkpoint=state,
        )
        with pipeline:
            encoded, labels = self._reader(dali, epoch)
            if isinstance(self.stream, CropStream):
                low, high = (float(np.log(ratio)) for ratio in RATIOS)
                area = fn.random.uniform(range=(self.stream.min_area, 1.0), shape=(ATTEMPTS,))
                ratio = dali.math.exp(fn.random.uniform(range=(low, high), shape=(ATTEMPTS,)))
                place = fn.random.uniform(range=(0.0, 1.0), shape=(2,))
                flip = fn.random.coin_flip() if self.stream.flip else dali.types.Constant(0)
                side = self.stream.size(epoch)
                size = dali.types.Constant([side, side], dtype=dali.types.FLOAT)
                images = self.decoder.training(dali, encoded, (area, ratio, place), flip, size)
            else:
                assert self.evaluation is not None
                images = self.decoder.evaluation(dali, encoded, *self.evaluation)
            pipeline.set_outputs(labels, *images)
        pipeline.build()
        return pipeline

    def _reader(self, dali: Any, epoch: int) -> tuple[Any, Any]:
        """Nodes of encoded images and labels, on the CPU."""
        training = isinstance(self.stream, CropStream)
        order = list(range(len(self.records.paths)))
        if isinstance(self.stream, CropStream):  # the same on every rank
            np.random.default_rng((self.stream.seed, epoch)).shuffle(order)
        return read_records(
            dali,
            self.records,
            order,
            shard_id=self.stream.rank,
            num_shards=self.stream.world_size,
            random_shuffle=training,
            initial_fill=SHUFFLE_BUFFER,
            stick_to_shard=True,
            pad_last_batch=not training,
        )


def count_records(records: RecordFiles) -> int:
    """Images in the files, by their indices. Raises ValueError for files that DALI does not read."""
    dali = import_dali()
    pipeline = dali.Pipeline(batch_size=1, num_threads=1, device_id=None, exec_dynamic=True)
    try:
        with pipeline:
            pipeline.set_outputs(*read_records(dali, records, list(range(len(records.paths)))))
        pipeline.build()
        return int(pipeline.reader_meta(_READER)["epoch_size"])
    except RuntimeError as error:
        raise ValueError(f"{records.paths[0].parent}: {reason(str(error))}") from error


def read_records(dali: Any, records: RecordFiles, order: list[int], **options: Any) -> tuple[Any, Any]:
    """Nodes of encoded images and labels of one of DALI's readers, over the files in this order."""
    fn = dali.fn
    paths = [str(records.paths[i]) for i in order]
    indices = [str(records.indices[i]) for i in order]
    if records.format == "webdataset":
        images, digits = fn.readers.webdataset(
            paths=paths,
            index_paths=indices,
            ext=list(READER_EXTENSIONS),
            missing_component_behavior="error",
            name=_READER,
            **options,
        )
        return images, fn.pad(digits, fill_value=ord(" "))
    if records.format == "tfrecord":
        import nvidia.dali.tfrecord as tfrec

        features = {
            "image/encoded": tfrec.FixedLenFeature([], tfrec.string, ""),
            "image/class/label": tfrec.FixedLenFeature([1], tfrec.int64, -1),
        }
        read = fn.readers.tfrecord(path=paths, index_path=indices, features=features, name=_READER, **options)
        return read["image/encoded"], read["image/class/label"]
    images, labels = fn.readers.mxnet(path=paths, index_path=indices, name=_READER, **options)
    return images, labels
