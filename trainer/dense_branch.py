"""The dense twin, finished: from the end of the last dense phase on, dense training to the end.

The paper's dense results come from such a branch: an AC/DC run's dense model has missed the epochs of the
last sparse phase, with their low learning rates. Optimizer, epoch and learning rates go on as if that last
compression had not been.
"""

from __future__ import annotations

from trainer.config import Config, SparsityConfig
from trainer.run_dir import DENSE_TWIN, RunDir


def dense_branch(config: Config, run: RunDir) -> Config:
    """The configuration of the dense branch of a finished run; it is one for trainer.build like any other."""
    return config.model_copy(
        update={
            "sparsity": SparsityConfig(schedule=f"dense {config.epochs}"),
            "checkpoint": str(run.checkpoints / DENSE_TWIN),
            "resume": None,
            "finetune_dense": False,
            "model": config.model.model_copy(update={"weights": None}),
        }
    )
