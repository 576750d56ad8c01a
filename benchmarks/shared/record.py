"""What all benchmarks share: spread of measurements, and records with provenance.

A record to publish comes from a commit. One made from a tree with uncommitted changes is said to be so, on
the screen and in its revision, and takes no published record's place.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from data.atomic import write_text
from trainer.checkpoints.environment import CHANGES, RECORDS, ROOT, environment, revision

RESULTS = ROOT / RECORDS
REVISION = revision()  # as the benchmark begins: the tree may change while it runs


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def percentile(values: Sequence[float], percent: int) -> float:
    """Of two or more values, by linear interpolation between them: never beyond the greatest."""
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def show_spread(values: dict[str, float], digits: int = 1, times: float = 1) -> str:
    """ "12.3 (11.9 to 12.8)" """
    median, low, high = (f"{times * values[key]:,.{digits}f}" for key in ("median", "min", "max"))
    return f"{median} ({low} to {high})"


def console() -> Console:
    """As wide as the terminal, and wide enough for tables elsewhere."""
    screen = Console(highlight=False)
    return screen if screen.is_terminal else Console(highlight=False, width=170)


def show_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], texts: Sequence[str], title: str | None = None
) -> None:
    """Print a table. texts: the columns that do not hold figures."""
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="left" if column in texts else "right")
    for row in rows:
        table.add_row(*row)
    console().print(table)


class Parser(argparse.ArgumentParser):
    """The command line of `acdc bench NAME`. doc: the module's docstring, which begins with what it does."""

    def __init__(self, name: str, doc: str | None) -> None:
        super().__init__(prog=f"acdc bench {name}", description=(doc or "").splitlines()[0])

    def add_number(self, option: str, default: int | None, help: str) -> None:
        """help: with the default in it only where that is not a number."""
        shown = help if default is None else f"{help}; default: {default}"
        self.add_argument(option, type=int, default=default, metavar="N", help=shown)

    def add_numbers(self, option: str, kind: type, metavar: str, help: str, default: Any = None) -> None:
        """One or more of them, in a list."""
        self.add_argument(option, type=kind, nargs="+", default=default, metavar=metavar, help=help)


def parse(parser: argparse.ArgumentParser, name: str) -> argparse.Namespace:
    """The command line, with --out for the record's place, by default the published NAME.json. A tree with
    changes is mentioned at once, before the work."""
    parser.add_argument(
        "--out", type=Path, default=RESULTS / f"{name}.json", metavar="FILE", help="where the record goes"
    )
    options = parser.parse_args()
    mention_changes()
    return options


def mention_changes() -> None:
    """Where the tree has some, say at once that no record to publish comes from it."""
    if (fault := reason_unpublished(REVISION)) is not None:
        notice = f"{fault}: what this run measures is not a record to publish"
        Console(stderr=True).print(notice, style="red", soft_wrap=True)


def settings(options: argparse.Namespace) -> dict[str, str]:
    """The options of the command line, as a record holds them."""
    return {key: str(value) for key, value in vars(options).items() if key != "out"}


def reason_unpublished(revision: str | None) -> str | None:
    """Why code of this revision (see trainer.checkpoints.environment) makes no record to publish, or None."""
    if revision is None:
        return "the code is not in a git checkout"
    return "the tree has uncommitted changes (git status)" if revision.endswith(CHANGES) else None


def place_of(path: Path, revision: str | None) -> Path:
    """Where a record goes: `path`, but NAME.dirty.json, which git ignores, for a published NAME.json that
    the code of this revision must not replace."""
    published = path.resolve().is_relative_to(RESULTS)
    return path.with_suffix(".dirty.json") if published and reason_unpublished(revision) else path


def write_record(path: Path, content: dict[str, Any], *, quietly: bool = False) -> None:
    """A JSON record, with what machine, versions, revision and command it comes from: whole or not at all.
    quietly: nothing on the screen, for one that is written again."""
    found = environment()
    if found["revision"] != REVISION and REVISION is not None:
        found["revision"] = REVISION.removesuffix(CHANGES) + CHANGES  # changed while it ran
    path, fault = place_of(path, found["revision"]), reason_unpublished(found["revision"])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({"environment": found, **content}, indent=1) + "\n")
    if quietly:
        return
    print(f"record: {path}")
    if fault is not None:
        console().print(f"NOT A RECORD TO PUBLISH: {fault}", style="bold red", soft_wrap=True)
