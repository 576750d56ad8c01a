"""Which images each rank sees in which order, shifted and flipped how: pure functions of the position.

Nothing here has state, so any position of any epoch can be started from. Every draw belongs to a place in the
*global* batch: how many ranks share it changes nothing about what the batch holds.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.augment import Augment

_ORDER, _AUGMENT = 0, 1  # keys of independent random streams under one seed


class Draw(NamedTuple):
    """What one batch of one rank is made of.

    indices: int64, (N,), into the data set. counts: bool, (N,), False where an image only fills up a last
    batch: it carries no loss and no score. shift: int32, (N, 2), rows and columns that the crop window moves,
    in -padding .. padding. flip: int32, (N,), 1 to mirror left and right. operations, levels: int32,
    (N, num_ops), of data.augment.Augment; num_ops is 0 without one.
    """

    indices: NDArray[np.int64]
    counts: NDArray[np.bool_]
    shift: NDArray[np.int32]
    flip: NDArray[np.int32]
    operations: NDArray[np.int32]
    levels: NDArray[np.int32]


def check_batch(global_batch: int, world_size: int, micro_batches: int) -> None:
    """Raise ValueError where a batch cannot be shared by ranks and accumulation steps."""
    if global_batch % (world_size * micro_batches):
        raise ValueError(
            f"a batch of {global_batch} does not divide by {world_size} devices x "
            f"{micro_batches} accumulation steps"
        )


@dataclass(frozen=True)
class TrainStream:
    """A new permutation every epoch. The last global batch, where it is incomplete, is filled up with repeats
    of its own images, which do not count: every image counts once an epoch, every batch has one shape.

    global_batch: images per optimizer step over all ranks; micro_batches: into how many batches a rank splits
    its share of it. max_steps: global batches after which an epoch ends early. Raises ValueError where these
    do not divide, or the set is smaller than one global batch."""

    num_images: int
    global_batch: int
    seed: int
    rank: int = 0
    world_size: int = 1
    micro_batches: int = 1
    crop_padding: int = 0
    flip: bool = False
    max_steps: int | None = None
    augment: Augment | None = None

    def __post_init__(self) -> None:
        check_batch(self.global_batch, self.world_size, self.micro_batches)
        if self.num_images < self.global_batch:
            raise ValueError(
                f"{self.num_images} training images are fewer than one batch of {self.global_batch}"
            )
        steps = -(-self.num_images // self.global_batch)
        if self.max_steps is not None and self.max_steps > steps:
            raise ValueError(f"steps_per_epoch {self.max_steps}: an epoch has no more than {steps} steps")

    @property
    def batch_size(self) -> int:
        return self.global_batch // (self.world_size * self.micro_batches)

    @property
    def batches_per_epoch(self) -> int:
        steps = -(-self.num_images // self.global_batch)
        return min(steps, self.max_steps or steps) * self.micro_batches

    def place(
        self, epoch: int, index: int
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_], slice, np.random.Generator]:
        """(indices of this rank's batch, which of them count, the batch's part of the global batch, the
        global batch's random numbers)."""
        step, micro = divmod(index, self.micro_batches)
        begin = (micro * self.world_size + self.rank) * self.batch_size
        mine = slice(begin, begin + self.batch_size)
        order = _permutation(self.seed, epoch, self.num_images)
        images = order[step * self.global_batch : (step + 1) * self.global_batch]
        places = np.arange(mine.start, mine.stop)
        indices, counts = images[places % len(images)], places < len(images)
        return indices, counts, mine, np.random.default_rng((self.seed, _AUGMENT, epoch, step))

    def draw(self, epoch: int, index: int) -> Draw:
        indices, counts, mine, random = self.place(epoch, index)
        size, reach = self.global_batch, self.crop_padding
        shift = random.integers(-reach, reach, (size, 2), dtype=np.int32, endpoint=True)[mine]
        flip = random.integers(0, 1, size, dtype=np.int32, endpoint=True)[mine]
        drawn = (part[mine] for part in self.draw_operations(random))
        return Draw(indices, counts, shift, flip if self.flip else np.zeros_like(flip), *drawn)

    def draw_operations(self, random: np.random.Generator) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """The global batch's operations and levels. Drawn last, they change no other draw."""
        if self.augment is None:
            return _no_operations(self.global_batch)
        return self.augment.draw(random, self.global_batch)

    def fingerprint(self) -> dict[str, Any]:
        # where there is none, no word of it: checkpoints from before it go on
        augment = {"augment": asdict(self.augment)} if self.augment else {}
        return {
            "num_images": self.num_images,
            "global_batch": self.global_batch,
            "seed": self.seed,
            "micro_batches": self.micro_batches,
            "crop_padding": self.crop_padding,
            "flip": self.flip,
            "max_steps": self.max_steps,
            "order": _order_digest(self.seed, self.num_images),
            **augment,
        }


@dataclass(frozen=True)
class EvalStream:
    """Every image exactly once over all ranks, in order, unchanged; image 0 fills up the last batches."""

    num_images: int
    batch_size: int
    rank: int = 0
    world_size: int = 1
    augment = None

    @property
    def batches_per_epoch(self) -> int:
        return -(-self.num_images // (self.batch_size * self.world_size))

    def draw(self, epoch: int, index: int) -> Draw:
        begin = (index * self.world_size + self.rank) * self.batch_size
        indices = np.arange(begin, begin + self.batch_size)
        none = np.zeros(self.batch_size, np.int32)
        counts = indices < self.num_images
        shift, operations = np.stack([none, none], axis=1), _no_operations(self.batch_size)
        return Draw(np.where(counts, indices, 0), counts, shift, none, *operations)

    def fingerprint(self) -> dict[str, Any]:
        return {"num_images": self.num_images}


Stream = TrainStream | EvalStream  # of one rank; a CropStream is a TrainStream


def _no_operations(count: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    return np.zeros((count, 0), np.int32), np.zeros((count, 0), np.int32)


@lru_cache(maxsize=2)  # the loader reads ahead, over the end of an epoch
def _permutation(seed: int, epoch: int, num_images: int) -> NDArray[np.int64]:
    return np.random.default_rng((seed, _ORDER, epoch)).permutation(num_images)


@lru_cache(maxsize=2)
def _order_digest(seed: int, num_images: int) -> str:
    """Tells whether this numpy draws what another one drew: SHA-256 of the first epoch's order and more."""
    digest = hashlib.sha256(_permutation(seed, 0, num_images).astype("<i8").tobytes())
    digest.update(np.random.default_rng((seed, _AUGMENT, 0, 0)).random(64).astype("<f8").tobytes())
    digest.update(np.random.default_rng((seed, _AUGMENT, 0, 1)).integers(0, 9, 64).astype("<i8").tobytes())
    return digest.hexdigest()
