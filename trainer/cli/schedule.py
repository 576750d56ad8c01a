"""`acdc schedule`: a recipe's phases and learning rates, epoch by epoch and as a drawing."""

from __future__ import annotations

import argparse
import sys

from trainer.errors import UserError
from trainer.monitor.terminal import announce

_STEPS = 1000  # of an epoch whose data nobody has counted yet: rates at its ends hardly depend on it


def schedule(options: argparse.Namespace) -> int:
    """A recipe's phases, learning rates and sparsity, by epoch and drawn, without training."""
    from trainer.config.load import load_config
    from trainer.monitor.drawing import draw_schedule, for_encoding
    from trainer.optim import learning_rate

    config = load_config(options.config, options.overrides)
    phases, actions = config.sparsity.build_schedule(), config.sparsity.build_actions()
    steps = config.steps_per_epoch or _STEPS
    if config.steps_per_epoch is None and (config.lr.warmup or "").endswith("st"):
        raise UserError(
            f"lr.warmup={config.lr.warmup}: how long that is, the data will tell; to see the schedule, give "
            "an epoch's steps, as in steps_per_epoch=500"
        )
    print(f"{phases}    {config.sparsity.build_pattern(config.seed)}")
    for epoch in range(config.epochs):
        phase, action = phases.phase_at(epoch), ""
        if epoch in actions:
            action = "decompress" if actions[epoch] is None else "compress"
        ends = (0,) if config.lr.by == "epoch" else (0, steps - 1)
        base = config.optimizer.lr
        rates = [learning_rate(config.lr, base, epoch, config.epochs, step, steps) for step in ends]
        lr = " to ".join(f"{rate:.6g}" for rate in rates)
        print(f"epoch {epoch:3}  {phase.kind:6}  lr {lr}  {action}".rstrip())
    print()
    print(for_encoding("\n".join(draw_schedule(config, steps)), sys.stdout.encoding))
    if options.cost:
        print()
        announce("loading", "DeepSpeed and DALI")
        from trainer.cli.cost import cost_lines

        print("\n".join(cost_lines(config)))
    return 0
