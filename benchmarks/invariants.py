"""Under the launcher, on every rank: trains a recipe and looks at its state before and after every phase
switch and after every step; writes what it saw to OUT/rank<N>.json.

    deepspeed --num_gpus 2 --module benchmarks.invariants OUT RECIPE [key=value ...]
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch import Tensor

from sparsity import num_leaked
from sparsity.masters import ZeroMasters, masters_of
from trainer.build import build_trainer
from trainer.config.load import load_config
from trainer.distributed import ranks
from trainer.engine import num_graphs
from trainer.loop import Trainer


@dataclass
class Seen:
    """leaks: dropped weights that were not exactly 0, summed over the looks; master_leaks: the same in the
    fp32 masters of ZeRO-1/2. masks: a digest of each compression's masks. graphs: compiled so far, at each
    switch."""

    looks: int = 0
    leaks: int = 0
    master_leaks: int = 0
    masks: list[str] = field(default_factory=list)
    momentum_after_decompression: list[float] = field(default_factory=list)
    graphs: list[int] = field(default_factory=list)
    num_weights: int = 0
    num_kept: int = 0


class Watch:
    """Stands in for acdc.before_step, and looks at the state that the step before left."""

    def __init__(self, trainer: Trainer) -> None:
        self.acdc, self.before_step = trainer.acdc, trainer.acdc.before_step
        self.masters = masters_of(trainer.engine)
        self.seen = Seen()
        self.acdc.before_step = self  # type: ignore[method-assign]

    def __call__(self) -> None:
        self.look()
        self.before_step()
        epoch, within = divmod(self.acdc.step - 1, self.acdc.steps_per_epoch)
        if within == 0 and epoch in self.acdc.schedule.compressions:
            self.seen.masks.append(digest(self.acdc.masks()))
            self.seen.graphs.append(num_graphs())
            self.look()
        if within == 0 and epoch in self.acdc.schedule.decompressions:
            self.seen.graphs.append(num_graphs())
            self.seen.momentum_after_decompression.append(self.biggest_momentum())

    def look(self) -> None:
        self.seen.looks += 1
        self.seen.leaks += num_leaked(self.acdc.weights(), self.acdc.masks())
        if isinstance(self.masters, ZeroMasters):
            for layer in self.acdc.layers.values():
                for _, fragment, keep in self.masters.fragments(layer.weight, layer.mask):
                    self.seen.master_leaks += int(((fragment != 0) & ~keep).sum())

    def biggest_momentum(self) -> float:
        parameters = list(self.acdc.model.parameters())
        states = [value for parameter in parameters for value in self.masters.state(parameter).values()]
        assert len(states) == len(parameters), "every parameter has a momentum"
        return max(value.abs().max().item() for value in states)

    def close(self) -> Seen:
        """Look once more, after the last step."""
        self.look()
        self.seen.num_kept = sum(int(mask.sum()) for mask in self.acdc.masks().values())
        self.seen.num_weights = sum(mask.numel() for mask in self.acdc.masks().values())
        return self.seen


def digest(masks: dict[str, Tensor]) -> str:
    """SHA-256 over all masks in the model's order."""
    sha = hashlib.sha256()
    for mask in masks.values():
        sha.update(mask.cpu().contiguous().numpy().data)
    return sha.hexdigest()


def main(out: Path, recipe: str, overrides: list[str]) -> None:
    trainer = build_trainer(load_config(recipe, overrides), ranks.start())
    watch = Watch(trainer)
    trainer.fit()
    trainer.close()
    (out / f"rank{ranks.rank()}.json").write_text(json.dumps(asdict(watch.close())), encoding="utf-8")


def launcher_arguments() -> list[str]:
    """This module's arguments without the one that the launcher puts in."""
    return [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]


if __name__ == "__main__":
    folder, name, *assignments = launcher_arguments()
    main(Path(folder), name, assignments)
