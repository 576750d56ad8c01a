"""Entry point of every training process: deepspeed --module trainer.train CONFIG [key=value ...]"""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.distributed.slurm import read_step
from trainer.errors import (
    EnvironmentFailure,
    Finished,
    ProcessDied,
    UserError,
    exit_code_of,
    is_out_of_memory,
    out_of_memory,
)
from trainer.monitor.terminal import announce, keep_quiet, lasting_output

if TYPE_CHECKING:
    import torch

    from trainer.checkpoints.run_dir import RunDir
    from trainer.config.schema import Config


def main(arguments: list[str] | None = None) -> int:
    # Before torch is imported, which asks once: memory in pages of 2 MB, on a CPU
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    parser = argparse.ArgumentParser(
        prog="deepspeed --module trainer.train", description="Train an AC/DC recipe."
    )
    parser.add_argument("config", metavar="CONFIG", help="a recipe's name under configs/, or a path")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. optimizer.lr=0.05")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the launcher passes it
    parser.add_argument("--run_file", type=Path, help=argparse.SUPPRESS)  # see trainer.cli.restarts
    options, rest = parser.parse_known_args(arguments)
    if rest:
        from trainer.config.mistakes import meant_by_options

        unknown = f"unrecognized arguments: {' '.join(rest)}; keys of a recipe have no dashes"
        parser.error(f"{unknown}: write {meant_by_options(rest)}")
    read_step()
    main_rank = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(
        level=logging.INFO if main_rank else logging.ERROR, format="%(levelname)s: %(message)s"
    )
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # announces its font cache

    def run() -> int:
        try:
            train(options.config, options.overrides, options.run_file)
        except Exception as error:
            if not main_rank or isinstance(error, ProcessDied):
                time.sleep(5)  # the launcher ends all ranks when one ends: let the first say what is wrong
            raise
        return 0

    with lasting_output():
        return exit_code_of(run)


def train(recipe: str, overrides: list[str], run_file: Path | None = None) -> None:
    """Parse, build, fit, close; then the dense branch if asked for. Raises Failure for what users mend.

    run_file: the run's folder is written there once it is known.
    """
    if os.environ.get("RANK", "0") == "0":
        announce("loading", "PyTorch and DeepSpeed")
    from trainer.config.load import load_config

    config = load_config(recipe, overrides)  # before the slow imports: a typing error is reported at once

    from trainer.checkpoints.run_dir import find_resumed, is_finished
    from trainer.distributed import ranks

    device = ranks.start()
    try:
        run = fit(config, device, run_file=run_file)
    except Finished:
        resumed = ranks.on_main(lambda: find_resumed(config))
        if resumed is None or not config.finetune_dense or is_finished(resumed[0], config):
            raise
        run = resumed[0]
    if config.finetune_dense:
        finetune_dense(config, run, device)


def finetune_dense(config: Config, run: RunDir, device: torch.device) -> None:
    """The dense branch of a finished run, which stays locked meanwhile."""
    from trainer.distributed import ranks
    from trainer.summary import finish_both

    gc.collect()  # the engine refers to itself: model, masters and data threads of the finished run go
    ranks.on_main(run.lock)
    try:
        with contextlib.suppress(Finished):  # but not yet concluded
            fit(dense_branch(config, run), device, run.finetuned_dense)
        if ranks.is_main():
            with refused_by_disk(run):
                finish_both(run)
    finally:
        run.release()


def dense_branch(config: Config, run: RunDir) -> Config:
    """The configuration of a finished run's dense branch: from the end of the last dense phase on, optimizer,
    epoch and learning rates go on as if the last compression had not been. The paper's dense results come
    from such a branch: the dense twin has missed the last epochs, with their low learning rates."""
    from trainer.checkpoints.run_dir import DENSE_TWIN
    from trainer.config.sparsity import SparsityConfig

    return config.model_copy(
        update={
            "sparsity": SparsityConfig(schedule=f"dense {config.epochs}"),
            "checkpoint": str(run.checkpoints / DENSE_TWIN),
            "resume": None,
            "finetune_dense": False,
            "model": config.model.model_copy(update={"weights": None}),
        }
    )


def fit(
    config: Config, device: torch.device, path: Path | None = None, run_file: Path | None = None
) -> RunDir:
    """One run to its end, in its own folder or in `path`."""
    from trainer.distributed.ranks import is_loss_of_another, is_main

    say = announce if is_main() else keep_quiet
    say("loading", "DALI and TensorBoard")

    from data.atomic import write_text
    from sparsity import MaskError
    from trainer.build import build_trainer
    from trainer.summary import finish, log_start

    trainer = build_trainer(config, device, path, say)
    log_start(trainer)
    try:
        with refused_by_disk(trainer.run_dir):
            if run_file is not None and is_main():
                run_file.parent.mkdir(parents=True, exist_ok=True)
                write_text(run_file, str(trainer.run_dir.resumed_by.resolve()))
            trainer.fit()
            finish(trainer)
    except MaskError as error:
        raise UserError(f"sparsity: {error}") from error
    except (RuntimeError, MemoryError) as error:
        then = f"go on with resume={trainer.run_dir.resumed_by}"
        if is_out_of_memory(error):
            raise out_of_memory(error, f"; then {then}") from error
        if is_loss_of_another(error):
            raise ProcessDied(f"another process of this run has ended; {then}") from error
        raise
    finally:
        trainer.close()
    return trainer.run_dir


@contextlib.contextmanager
def refused_by_disk(run: RunDir) -> Iterator[None]:
    """Turn an OSError, of a full disk or a lost mount, into an EnvironmentFailure."""
    try:
        yield
    except OSError as error:
        if not run.path.is_dir():
            raise EnvironmentFailure(
                f"the run folder {run.path} is gone: it was removed, or its disk, while the run was going "
                f"({error}). Nothing of the run is left there to go on with"
            ) from error
        # what was saved before is whole
        raise EnvironmentFailure(
            f"{error}; once that is mended, go on with resume={run.resumed_by}"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
