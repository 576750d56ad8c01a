"""Under the launcher, on every rank and for each ZeRO stage: benchmarks.invariants, then the same run resumed
from its middle, compared.

deepspeed --num_gpus 2 --module tests.trainer.distributed.rank_check OUT RECIPE [key=value ...]
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.invariants import Watch, launcher_arguments
from tests.trainer.runs import NUM_STEPS, assert_equal_states
from trainer.build import build_trainer
from trainer.checkpoints import checkpoint
from trainer.config.load import load_config
from trainer.distributed import ranks

RESUME_AT = 26  # in the middle of an epoch of a dense phase, with a compression and a decompression to come


def main(out: Path, recipe: str, overrides: list[str]) -> None:
    device = ranks.start()
    for stage in range(3):
        check(out / f"stage{stage}", recipe, [*overrides, f"engine.zero_stage={stage}"], device)


def check(out: Path, recipe: str, overrides: list[str], device: torch.device) -> None:
    overrides = [*overrides, f"run_root={out}", f"save.every={RESUME_AT}st", "save.keep=9"]
    trainer = build_trainer(load_config(recipe, overrides), device)
    watch = Watch(trainer)
    trainer.fit()
    folder = trainer.run_dir.path
    trainer.close()

    copy = out / "resumed" / folder.name
    if ranks.is_main():
        shutil.copytree(folder, copy)
    dist.barrier()
    point = checkpoint.step_folder(copy / "checkpoints", RESUME_AT)
    resumed = build_trainer(load_config(recipe, [*overrides, f"resume={point}"]), device)
    assert resumed.acdc.step == RESUME_AT
    resumed.fit()
    resumed.close()
    dist.barrier()
    last = [checkpoint.step_folder(run / "checkpoints", NUM_STEPS) for run in (folder, copy)]
    assert_equal_states(*(checkpoint.read(path, checkpoint.STATE) for path in last))
    (out / f"rank{ranks.rank()}.json").write_text(json.dumps(asdict(watch.close())))


if __name__ == "__main__":
    folder, name, *assignments = launcher_arguments()
    main(Path(folder), name, assignments)
