"""Accuracy of methods of sparse training over seeds, from runs that go on where they were stopped.

Trains what has no record yet, one run after another, and draws table and picture from the records: one JSON
a run under benchmarks/results/accuracy/TABLE/. What was found, and what it rests on: docs/evidence.md.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.accuracy import figures
from benchmarks.accuracy.runs import Run, runs_of, train
from benchmarks.accuracy.tables import TABLES
from benchmarks.shared.record import RESULTS, Parser, console, mention_changes, show_table
from trainer.errors import exit_code_of
from trainer.paths import user_path

DOCS = Path(__file__).parents[2] / "docs"


def main() -> int:
    parser = Parser("accuracy", __doc__)
    parser.add_argument("table", nargs="?", choices=TABLES, default="main", help="which; default: main")
    parser.add_argument("--plan", action="store_true", help="what is left to train, and for how long")
    parser.add_argument("--draw", action="store_true", help="table and picture of what there is, no training")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="these rows alone, as --plan names them")
    parser.add_argument("--run-root", default="runs/accuracy", metavar="FOLDER", help="of all run folders")
    parser.add_argument("--out", default=RESULTS / "accuracy", type=Path, metavar="FOLDER", help="of records")
    options = parser.parse_args()
    results, root = options.out.resolve(), user_path(options.run_root)
    if unknown := set(options.rows or ()) - {row.name for row in TABLES[options.table]}:
        parser.error(f"no row {', '.join(sorted(unknown))} in {options.table}; see --plan")
    runs = [run for run in runs_of(options.table) if not options.rows or run.row.name in options.rows]
    left = [run for run in runs if run.read(results) is None]
    if options.plan:
        plan(runs, left, results)
        return 0
    if not options.draw:
        mention_changes()
        for number, run in enumerate(left, 1):
            console().print(f"{number} of {len(left)}: {run}", style="bold")
            train(run, root, results)
    found = figures.read(options.table, results)
    rows = figures.lines(options.table, found)
    if not rows:
        parser.error(f"{options.table} has no records yet under {results}")
    show_table(figures.COLUMNS, rows, texts=figures.COLUMNS[:1])
    print("\n".join(["", "for a document:", *figures.markdown(rows)]))
    of_page = DOCS if results == RESULTS / "accuracy" else results
    figures.draw(options.table, found, of_page / f"evidence_{options.table}.svg")
    return 0


def plan(runs: Sequence[Run], left: Sequence[Run], results: Path) -> None:
    """Row by row: records there are, and hours that the others take, by records of this table."""
    rates = []
    for run in runs:
        if (record := run.read(results)) is not None:
            rates.append(record["result"]["seconds"] / len(record["curve"]))
    rate = statistics.median(rates) if rates else None  # seconds an epoch
    rows = []
    for row in dict.fromkeys(run.row for run in runs):
        missing = [run for run in left if run.row == row]
        hours = "?" if rate is None else f"{rate * len(missing) * row.config().epochs / 3600:.1f}"
        there = row.seeds - len(missing)
        rows.append((row.name, row.title, f"{there} of {row.seeds}", hours if missing else ""))
    show_table(("row", "method", "records", "hours left"), rows, texts=("row", "method"))
    epochs = sum(run.row.config().epochs for run in left)
    total = "unknown before the first" if rate is None else f"about {rate * epochs / 3600:.1f} hours"
    print(f"{len(left)} of {len(runs)} runs are left, {epochs:,} epochs: {total}")


if __name__ == "__main__":
    raise SystemExit(exit_code_of(main))
