"""Under the launcher, on every rank: trains, looks after every step, writes what it saw to OUT/rank<N>.json.

python -m deepspeed.launcher.runner --num_gpus 2 --module tests.trainer.rank_check OUT RECIPE [key=value ...]
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from sparsity import num_leaked
from sparsity.masters import ZeroMasters, masters_of
from tests.trainer.runs import NUM_STEPS, assert_equal_states
from trainer import checkpoint, ranks
from trainer.build import build_trainer
from trainer.config import load_config
from trainer.loop import Trainer

RESUME_AT = 26  # in the middle of an epoch of a dense phase


class Watch:
    """Stands in for acdc.before_step and looks at the state that the step before left."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.before_step = trainer, trainer.acdc.before_step
        self.masters = masters_of(trainer.engine)
        self.seen: dict[str, Any] = {
            "leaks": 0, "master_leaks": 0, "momentum_after_decompression": [], "masks": [], "steps_watched": 0
        }  # fmt: skip

    def __call__(self) -> None:
        acdc, seen = self.trainer.acdc, self.seen
        self.look()
        self.before_step()
        epoch, within = divmod(acdc.step - 1, acdc.steps_per_epoch)
        if within == 0 and epoch in acdc.schedule.compressions:
            digest = hashlib.sha256()
            for mask in acdc.masks().values():
                digest.update(mask.contiguous().numpy())
            seen["masks"].append(digest.hexdigest())
            self.look()
        if within == 0 and epoch in acdc.schedule.decompressions:
            biggest = [
                value.abs().max().item()
                for parameter in acdc.model.parameters()
                for value in self.masters.state(parameter).values()
            ]
            assert len(biggest) == len(list(acdc.model.parameters()))
            seen["momentum_after_decompression"].append(max(biggest))

    def look(self) -> None:
        acdc = self.trainer.acdc
        self.seen["steps_watched"] += 1
        self.seen["leaks"] += num_leaked(acdc.weights(), acdc.masks())
        if isinstance(self.masters, ZeroMasters):
            for layer in acdc.layers.values():
                for _, fragment, keep in self.masters.fragments(layer.weight, layer.mask):
                    self.seen["master_leaks"] += int(((fragment != 0) & ~keep).sum())


def main(out: Path, recipe: str, overrides: list[str]) -> None:
    device = ranks.start()
    overrides = [*overrides, f"checkpoint.every={RESUME_AT}st", "checkpoint.keep=9"]
    trainer = build_trainer(load_config(recipe, overrides), device)
    watch = Watch(trainer)
    trainer.acdc.before_step = watch  # type: ignore[method-assign]
    trainer.fit()
    folder = trainer.run_dir.path
    if trainer.monitor:
        trainer.monitor.close()

    copy = out / "resumed" / folder.name
    if ranks.is_main():
        shutil.copytree(folder, copy)
    dist.barrier()
    point = checkpoint.step_folder(copy / "checkpoints", RESUME_AT)
    resumed = build_trainer(load_config(recipe, [*overrides, f"resume={point}"]), device)
    assert resumed.acdc.step == RESUME_AT
    resumed.fit()
    if resumed.monitor:
        resumed.monitor.close()
    last = [checkpoint.step_folder(run / "checkpoints", NUM_STEPS) for run in (folder, copy)]
    states = [checkpoint.read(path, checkpoint.STATE) for path in last]
    assert_equal_states(*states)
    watch.seen["resumed_equal"] = True
    watch.seen["kept"] = sum(int(mask.sum()) for mask in trainer.acdc.masks().values())
    (out / f"rank{ranks.rank()}.json").write_text(json.dumps(watch.seen))


if __name__ == "__main__":
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(Path(arguments[0]), arguments[1], arguments[2:])
