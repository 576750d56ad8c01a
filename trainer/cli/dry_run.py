"""What a run would do, without doing it: the resolved recipe, its phases, what is pruned and what is not."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from sparsity.stats import shares_unpruned
from trainer.checkpoints import checkpoint
from trainer.checkpoints.run_dir import find_resumed
from trainer.checkpoints.state import Position, check_restorable
from trainer.config.changes import Change, changes, check_changes, with_beginning
from trainer.config.recipes import dump_recipe
from trainer.config.schema import Config
from trainer.engine import check_precision
from trainer.errors import as_user_error
from trainer.monitor.screen import Screen
from trainer.monitor.terminal import announce
from trainer.task import Task, build_task


def dry_run(config: Config) -> int:
    """Data, model and masks are built as for a run, and so whatever is wrong with them is found; no folder is
    made and nothing is trained."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_precision(config.engine, device)
    resumed = find_resumed(config)
    began, past = None if resumed is None else resumed[1], None
    if began is not None:
        with as_user_error(f"resume {began}"):
            past = checkpoint.read_info(began).get("config")
        config = with_beginning(config, past)
    task = build_task(config, device, None if began else config.model.weights, began, announce)
    changed = [] if began is None else _changed(began, past, task)
    console = Screen(0, 0, 0).console
    console.print(dump_recipe(config.model_dump(mode="json")), markup=False)
    console.print(f"data        {task.loaders.describe()}", markup=False, soft_wrap=True)
    console.print(f"steps       {task.acdc.steps_per_epoch:,} an epoch", markup=False, soft_wrap=True)
    for about, text in task.notes.items():
        console.print(f"{about:<10}  {text}", markup=False, soft_wrap=True)
    console.print(_phases(task), _pruned(task), _left_dense(task))
    for change in changed:
        console.print(f"changed     {change}", markup=False, soft_wrap=True)
    goes = f"a new run goes to {config.run_root}/{config.name}/" if began is None else f"it resumes {began}"
    console.print(f"nothing was trained; without --dry-run {goes}", markup=False, soft_wrap=True)
    return 0


def _changed(began: Path, past: Any, task: Task) -> list[Change]:
    """What the recipe changes in that of the training state `began`. Raises UserError where the run would."""
    with as_user_error(f"resume {began}"):
        state = checkpoint.read(began, checkpoint.STATE)
        # packed images have a shard for each process, and a run may have more of these than a dry one
        if "shards" in (data := state.get("data") or {}):
            state["data"] = {**data, "shards": 1}
        check_restorable(state, task.acdc, task.loaders.train)
        found = changes(past, task.config)
        check_changes(found, task.config, asdict(Position(**state["position"])))
    return found


def _phases(task: Task) -> Table:
    table = Table("phase", "epochs", title="phases", title_justify="left")
    for phase in task.acdc.schedule.phases:
        table.add_row(phase.kind, f"{phase.start + 1} to {phase.end}")
    return table


def _pruned(task: Task) -> Table:
    table = Table("layer", "shape", title=f"pruned, {task.acdc.pattern}", title_justify="left")
    table.add_column("weights", justify="right")
    weights = task.acdc.weights()
    for name, weight in weights.items():
        table.add_row(name, " x ".join(map(str, weight.shape)), f"{weight.numel():,}")
    table.add_row("all", "", f"{sum(weight.numel() for weight in weights.values()):,}")
    return table


def _left_dense(task: Task) -> Table:
    table = Table("parameter", title="not pruned", title_justify="left")
    table.add_column("of all weights", justify="right")
    shares = shares_unpruned(task.acdc.model, task.acdc.layers)
    for name, share in shares.items():
        table.add_row(name, f"{100 * share:.2f} %")
    table.add_row("all", f"{100 * sum(shares.values()):.2f} %")
    return table
