"""Packed images through DALI's own readers, read in sequence, then what data.dali.images does.

Every epoch is read by a pipeline of its own, seeded by (seed, epoch, rank), over the files in an order of its
own, with a shuffle buffer: what comes depends on (epoch, start) alone, as everywhere. A position within an
epoch is reached at once from a state that the pipeline gave there, and otherwise by reading up to it.
In a bad image's place stands the next of its batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from data.crops import CropStream
from data.dali.images import DaliImageLoader, Position
from data.dali.pipeline import PREFETCH, dense, import_dali, reason
from data.images.records import RecordFiles
from data.images.shards import READER_EXTENSIONS
from data.loader import PADDING_LABEL

SHUFFLE_BUFFER = 4096  # images a rank holds, encoded, to draw the next one from: about 450 MB of ImageNet
_READER = "records"


class _Read(NamedTuple):
    """A batch as read. images: the encoded bytes. names: file and place in it. before: the reader's state
    from which this batch comes next, None at an epoch's beginning."""

    images: list[NDArray[np.uint8]]
    labels: NDArray[np.int64]
    names: list[NDArray[np.uint8]]
    before: bytes | None


class DaliRecordLoader(DaliImageLoader):
    """Batches of `records`: a CropStream makes them the training set, an EvalStream the other. arguments:
    DaliImageLoader's; images are named by their file and the place in it.

    first_label: what class 0 has for a number in the files. Raises OSError for labels beyond num_classes, and
    for files that cannot be read."""

    def __init__(self, records: RecordFiles, num_classes: int, first_label: int, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.records, self.num_classes, self.first_label = records, num_classes, first_label
        self._reader: Any = None
        self._reads = (-1, -1)  # what the reader reads next
        self._state: tuple[Position, bytes] | None = None  # to start from
        self._under_way: dict[Position, _Read] = {}

    def fingerprint(self) -> dict[str, Any]:
        ours = {"backend": "dali", "format": self.records.format, "data": self.records.digest}
        ours |= self.decoder.fingerprint()
        return {**ours, **self.stream.fingerprint(), "shards": self.stream.world_size}

    def state(self) -> dict[str, Any]:
        """This rank's place within the epoch: position, DALI's state there, and its SHA-256, because DALI
        takes most damaged states for good ones. Empty at an epoch's beginning."""
        self.settle()
        read = self._under_way.get(self.position)
        if read is None or read.before is None:
            return {}
        content = torch.frombuffer(bytearray(read.before), dtype=torch.uint8)
        return {"position": self.position, "dali": content, "sha256": hashlib.sha256(read.before).hexdigest()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Be at the place where `state` was taken. Raises ValueError for a damaged one."""
        if state:
            content = state["dali"].numpy().tobytes()
            if hashlib.sha256(content).hexdigest() != state["sha256"]:
                raise ValueError("the data pipeline's state is damaged: its SHA-256 is not the one beside it")
            epoch, index = state["position"]
            self._state = ((epoch, index), content)

    def _start(self, epoch: int, start: int) -> None:
        if (epoch, start) not in self._under_way:
            self._under_way = {}
            known = self._state is not None and self._state[0] == (epoch, start)
            self._open(epoch, self._state[1] if known and self._state else None)
            self._state = None
            for _ in range(0 if known else start):
                self._reader.run()
            self._reads = (epoch, start)
        super()._start(epoch, start)

    def _images(self, position: Position, draw: Any) -> tuple[list[NDArray[np.uint8]], NDArray[np.int64]]:
        read = self._read(position)
        rows = self._rows(position)
        if self.evaluation:  # what stands in does not count
            labels = np.where(rows == np.arange(len(rows)), read.labels, PADDING_LABEL)
        else:
            labels = np.where(read.labels == PADDING_LABEL, PADDING_LABEL, read.labels[rows])
        return [read.images[row] for row in rows], labels

    def _encoded(self, dali: Any, images: Any) -> Any:
        return images

    def _names(self, position: Position, draw: Any) -> list[str]:
        names = self._read(position).names
        return [names[row].tobytes().decode(errors="replace") for row in self._rows(position)]

    def _rows(self, position: Position) -> NDArray[np.int64]:
        """Which images of a read batch fill its places. Raises OSError where none is left."""
        size = self.stream.batch_size
        skips = np.array([self._skips.get((*position, i), 0) for i in range(size)])
        if (skips >= size).any():
            raise OSError(f"no image of a whole batch can be decoded, in {self.records.paths[0].parent}")
        return (np.arange(size) + skips) % size

    def _read(self, position: Position) -> _Read:
        """A batch under way, or the one that the reader reads next."""
        if position not in self._under_way:
            assert position == self._reads
            epoch, index = position
            if index == 0:
                self._open(epoch, None)
            before = self._reader.checkpoint() if index else None
            try:
                images, labels, names = self._reader.run()
            except RuntimeError as error:
                raise OSError(
                    f"{self.records.paths[0].parent} cannot be read: {reason(str(error))}"
                ) from error
            numbers = self._numbers(dense(labels).numpy())
            numbers[self._num_left(index) :] = PADDING_LABEL
            kept = {place: read for place, read in self._under_way.items() if place >= self.position}
            self._under_way = {**kept, position: _Read(_arrays(images), numbers, _arrays(names), before)}
            self._reads = self.after(position)
        return self._under_way[position]

    def _numbers(self, labels: Any) -> NDArray[np.int64]:
        """(N,): classes from what the readers give, decimal digits as text in WebDataset."""
        if self.records.format == "webdataset":
            labels = np.array([self._digits(bytes(row)) for row in labels], np.int64)
        numbers: NDArray[np.int64] = labels.reshape(-1).astype(np.int64) - self.first_label
        if numbers.min() < 0 or numbers.max() >= self.num_classes:
            raise OSError(
                f"{self.records.paths[0].parent} holds labels from {numbers.min() + self.first_label} to "
                f"{numbers.max() + self.first_label}, which data.first_label={self.first_label} and "
                f"{self.num_classes} classes do not allow: see data.first_label, data.num_classes"
            )
        return numbers

    def _digits(self, text: bytes) -> int:
        try:
            return int(np.int64(int(text)))
        except (ValueError, OverflowError) as error:
            raise OSError(
                f"{self.records.paths[0].parent} holds a label that is no number: {text[:40]!r}; each .cls "
                "is a class in decimal digits"
            ) from error

    def _num_left(self, index: int) -> int:
        """Images of this rank's share that are left at a batch; the reader repeats the last."""
        num, world, rank = self.num_images, self.stream.world_size, self.stream.rank
        share = num * (rank + 1) // world - num * rank // world
        return max(0, share - index * self.stream.batch_size)

    def _open(self, epoch: int, state: bytes | None) -> None:
        """A reader of one epoch, on the CPU."""
        dali = import_dali()
        training = isinstance(self.stream, CropStream)
        order = list(range(len(self.records.paths)))
        seed = np.random.SeedSequence((getattr(self.stream, "seed", 0), epoch, self.stream.rank))
        if isinstance(self.stream, CropStream):  # the same on every rank
            np.random.default_rng((self.stream.seed, epoch)).shuffle(order)
        self._reader = dali.Pipeline(
            batch_size=self.stream.batch_size,
            num_threads=1,  # one thread reads, another pads labels
            device_id=None,
            prefetch_queue_depth=PREFETCH,
            exec_dynamic=True,
            seed=int(seed.generate_state(1)[0]),
            enable_checkpointing=True,
            checkpoint=state,
        )
        with self._reader:
            encoded, labels = read_records(
                dali,
                self.records,
                order,
                shard_id=self.stream.rank,
                num_shards=self.stream.world_size,
                random_shuffle=training,
                initial_fill=SHUFFLE_BUFFER,
                stick_to_shard=True,
                pad_last_batch=True,
            )
            names = dali.fn.get_property(encoded, key="source_info")
            self._reader.set_outputs(encoded, labels, names)
        self._reader.build()


def _arrays(samples: Any) -> list[NDArray[np.uint8]]:
    """A DALI output on the CPU, a view of each sample."""
    return [np.asarray(samples[i]) for i in range(len(samples))]


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
    fn, options = dali.fn, {"name": _READER, **options}
    paths = [str(records.paths[i]) for i in order]
    indices = [str(records.indices[i]) for i in order]
    if records.format == "webdataset":
        images, digits = fn.readers.webdataset(
            paths=paths,
            index_paths=indices,
            ext=list(READER_EXTENSIONS),
            missing_component_behavior="error",
            **options,
        )
        return images, fn.pad(digits, fill_value=ord(" "))
    if records.format == "tfrecord":
        import nvidia.dali.tfrecord as tfrec

        features = {
            "image/encoded": tfrec.FixedLenFeature([], tfrec.string, ""),
            "image/class/label": tfrec.FixedLenFeature([1], tfrec.int64, -1),
        }
        read = fn.readers.tfrecord(path=paths, index_path=indices, features=features, **options)
        return read["image/encoded"], read["image/class/label"]
    images, labels = fn.readers.mxnet(path=paths, index_path=indices, **options)
    return images, labels
