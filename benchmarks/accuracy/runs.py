"""One run of a table: whether its record is there, its training by `acdc train`, its record.

A run that was stopped goes on where it was, by resume=auto in a folder of its own; one that has a record of
the recipe as it is now is not trained again.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.accuracy.images import root_of
from benchmarks.accuracy.tables import FIRST_TUNING_SEED, TABLES, Row
from benchmarks.shared.record import REVISION, place_of, reason_unpublished, write_record
from trainer.checkpoints.run_dir import DENSE_TWIN, RunDir, is_finished
from trainer.config.changes import changes
from trainer.config.recipes import read_yaml
from trainer.errors import UserError

CURVE = ("phase", "train_loss", "val_loss", "val_top1", "memorised_top1", "memorised_true_top1")


@dataclass(frozen=True)
class Run:
    table: str
    row: Row
    seed: int

    def __str__(self) -> str:
        return f"{self.table}, {self.row.title}, seed {self.seed}"

    @property
    def place(self) -> Path:
        """Of its folder, and of its record, in their roots."""
        table, name = (self.table, self.row.name) if self.row.same_as is None else ("main", self.row.same_as)
        return Path(table, f"{name}_{self.seed}")

    def record(self, results: Path) -> Path:
        return results / f"{self.place}.json"

    def read(self, results: Path) -> dict[str, Any] | None:
        """Its record; None where there is none, or one of a recipe that is another now."""
        path = self.record(results)
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return content if self.is_of(content.get("config")) else None

    def is_of(self, config: Any) -> bool:
        """Whether a configuration is this run's. What later versions added had its default."""
        if not config:
            return False
        found = changes(config, self.row.config())
        return all(change.is_free or change.key == "seed" for change in found)


def runs_of(table: str) -> Iterator[Run]:
    """Seed by seed, so that every row has some before one has all; a row after those that it starts from."""
    rows, first = TABLES[table], FIRST_TUNING_SEED if table == "tuning" else 1
    for seed in range(max(row.seeds for row in rows)):
        yield from (Run(table, row, first + seed) for row in rows if seed < row.seeds)


def train(run: Run, root: Path, results: Path) -> None:
    """Train to the end, whatever was done before, and write the record. root: of all run folders.
    Raises UserError where the run ends otherwise."""
    folder = finished(run, root) or _train(run, root)
    result, starts = folder.read_result(), trained_on(folder)
    assert result is not None
    del result["run"]
    content = {
        "recipe": run.row.recipe_name,
        "overrides": list(run.row.overrides),
        "images": run.row.images,
        "seed": run.seed,
        "config": run.row.config().model_dump(mode="json"),
        "trained_on": starts,
        "result": result,
        "curve": curve(folder),
    }
    path = run.record(results)
    changed = [start["revision"] for start in starts if reason_unpublished(start["revision"])]
    if changed and not reason_unpublished(REVISION):  # else write_record sees to it
        path = place_of(path, changed[0])
    write_record(path, content)


def finished(run: Run, root: Path) -> RunDir | None:
    """The run's folder, where it has come to its end."""
    for path in sorted((root / run.place).glob("*/*/result.json")):
        folder = RunDir(path.parent)
        if run.is_of(read_yaml(path.parent / "config.yaml")) and is_finished(folder, run.row.config()):
            return folder
    return None


def _train(run: Run, root: Path) -> RunDir:
    arguments = [
        f"seed={run.seed}",
        f"run_root={root / run.place}",
        f"data.root={root_of(run.row.images)}",
        *run.row.overrides,
    ]
    if run.row.after is not None:
        (row,) = (row for row in TABLES[run.table] if row.name == run.row.after)
        before = Run(run.table, row, run.seed)
        dense = finished(before, root) or _train(before, root)
        arguments.append(f"model.weights={dense.checkpoints / DENSE_TWIN}")
    command = ["train", run.row.recipe_name, *arguments, "resume=auto"]
    code = subprocess.run([sys.executable, "-m", "trainer.cli.main", *command], check=False).returncode
    folder = finished(run, root)
    if code or folder is None:
        raise UserError(f"{run} ended with exit code {code}; the same command goes on with it")
    return folder


def trained_on(folder: RunDir) -> list[dict[str, Any]]:
    """Revision and machine of each start, the first and those after a stop."""
    lines = [json.loads(line) for line in folder.history.read_text(encoding="utf-8").splitlines()]
    return [{key: line["env"][key] for key in ("revision", "cpu", "cpu_cores", "gpus")} for line in lines]


def curve(folder: RunDir) -> list[list[Any]]:
    """A row of CURVE an epoch; None for what a run does not have."""
    epochs = [record for record in folder.read_metrics() if record["kind"] == "epoch"]
    return [[_short(record.get(key)) for key in CURVE] for record in epochs]


def _short(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value
