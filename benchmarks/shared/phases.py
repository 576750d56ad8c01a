"""The turns of benchmarks.throughput: dense and compressed phase, each with real data and with noise.

One trainer takes them all. Its schedule is one compressed phase; switches are made by hand, between turns.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from benchmarks.shared.machine import Stopwatch, forget_peak
from benchmarks.shared.turns import endless, order, ratios, until_quiet
from data.loader import Batch, Loader
from data.synthetic import SyntheticLoader
from trainer.config.data import ImageNetData
from trainer.loop import Trainer

PHASES = ("dense", "compressed")
NOISE = "noise"


class Turn(NamedTuple):
    """steps: seconds of each, as the device meets them. waited: of these, for data; on a GPU from the end of
    the work before until the batch is there. refill: then, until the read-ahead was full."""

    steps: list[float]
    waited: float
    refill: float

    @property
    def seconds(self) -> float:
        return sum(self.steps) + self.refill


def sources_of(trainer: Trainer, real: bool) -> dict[str, Iterator[Batch]]:
    """Endless batches by kind: noise, and the run's own data, of files or of arrays in memory."""
    data, info, loader = trainer.config.data, trainer.loaders.info, trainer.loaders.train
    side = data.image_size if isinstance(data, ImageNetData) else info.shape[1]
    sizes = (loader.num_images, loader.batches_per_epoch, data.batch_size)
    noise = SyntheticLoader(*sizes, lambda _: side, info.num_classes, trainer.device)
    loaders: dict[str, Loader] = {NOISE: noise}
    if real:
        loaders["files" if isinstance(data, ImageNetData) else "arrays"] = loader
    return {kind: endless(loader) for kind, loader in loaders.items()}


def take_phases(
    trainer: Trainer,
    sources: Mapping[str, Iterator[Batch]],
    turns: int,
    steps: int,
    warmup: int,
    on_progress: Callable[[int, int], None],
) -> dict[tuple[str, str], list[Turn]]:
    """Turns of `steps` steps by phase and kind of data, in the order in which they were taken. `warmup` steps
    of each come first and do not count: they compile. on_progress: called with the turns done and in all."""
    trainer.acdc.before_step()  # compresses
    trainer.accelerate()
    for phase in PHASES:
        _switch(trainer, phase)
        for batches in sources.values():
            _turn(trainer, batches, warmup)
    forget_peak(trainer.device)  # what compiling and tuning took
    taken: dict[tuple[str, str], list[Turn]] = {key: [] for key in itertools.product(PHASES, sources)}
    for turn in range(turns):
        for phase in order(PHASES, turn):
            _switch(trainer, phase)
            for kind in order(list(sources), turn):
                taken[phase, kind].append(_turn(trainer, sources[kind], steps))
        on_progress(turn + 1, turns)
    return taken


def _switch(trainer: Trainer, phase: str) -> None:
    if phase == "compressed":
        trainer.acdc.compress(trainer.acdc.pattern)
    else:
        trainer.acdc.decompress()


def _turn(trainer: Trainer, batches: Iterator[Batch], count: int) -> Turn:
    """Steps as a run takes them: the host goes ahead, and the device is waited for once, at the end."""
    watch = Stopwatch(trainer.device)
    watch.mark()
    for _ in range(count):
        batch = next(batches)
        watch.mark()
        trainer.train_batch(iter([batch]))
        watch.mark()
    laps = watch.laps()
    stepped = time.perf_counter()
    waits, works = laps[::2], laps[1::2]
    steps = [wait + work for wait, work in zip(waits, works, strict=True)]
    return Turn(steps, sum(waits), until_quiet() - stepped)


def cost_of_data(real: Sequence[Turn], noise: Sequence[Turn]) -> dict[str, float]:
    """Spread of how much longer turns with real data take, as a share of those with noise beside them."""
    over = ratios([turn.seconds for turn in real], [turn.seconds for turn in noise])
    return {key: ratio - 1 for key, ratio in over.items()}
