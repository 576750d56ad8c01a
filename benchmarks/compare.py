"""What became slower: two records of one benchmark, figure by figure. Exit code 1 where one is worse.

What is better follows from a figure's name: times, waits, memory and graphs are better low, rates and ratios
of ours over others high. A figure with a spread is worse only where the spreads do not touch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.shared.record import Parser, console, show_table
from trainer.errors import UserError, exit_code_of

HIGH = re.compile("images_per|flops|utilisation|ours_over|dali_over|loader_alone|top1|layers_on_kernels")
LOW = re.compile("seconds|ms_per|step|wait|cost|memory|ratio|compress|first|sparse|dense|graphs")
LABELS = ("network", "layer", "phase", "data", "precision", "percent", "batch")
SETTINGS = ("environment", "options", "batch", "bar", "shape", "num_weights", "copy")


def main() -> int:
    parser = Parser("compare", __doc__)
    parser.add_argument("before", type=Path, metavar="BEFORE", help="a record")
    parser.add_argument("after", type=Path, metavar="AFTER", help="one of the same benchmark")
    parser.add_argument("--tolerance", type=float, default=0.05, metavar="SHARE", help="default: 0.05")
    options = parser.parse_args()
    before, after = _read(options.before), _read(options.after)
    machines = [(record["environment"]["cpu"], record["environment"]["gpus"]) for record in (before, after)]
    screen = console()
    if machines[0] != machines[1]:
        screen.print(f"other machines: {machines[0]} before, {machines[1]} after", style="yellow")
    changes = compare(before, after, options.tolerance)
    if not changes:
        parser.error(f"{options.before} and {options.after} have no figure in common")
    rows = [
        (name, f"{old:,.4g}", f"{new:,.4g}", f"{100 * (new / old - 1):+.1f} %" if old else "-", verdict)
        for name, old, new, verdict in changes
    ]
    show_table(("figure", "before", "after", "change", ""), rows, texts=("figure", ""))
    worse = sum(verdict == "worse" for *_, verdict in changes)
    screen.print(f"{worse} of {len(changes)} figures are worse by more than {options.tolerance:.0%}")
    return 1 if worse else 0


def compare(
    before: dict[str, Any], after: dict[str, Any], tolerance: float
) -> list[tuple[str, float, float, str]]:
    """(name, before, after, "worse" | "better" | "") of every figure that both records have."""
    old, new = dict(_figures(before)), dict(_figures(after))
    return [
        (name, old[name][0], new[name][0], _verdict(_sign(name), old[name], new[name], tolerance))
        for name in old
        if name in new
    ]


def _verdict(
    sign: int, old: tuple[float, float, float], new: tuple[float, float, float], tolerance: float
) -> str:
    """sign: 1 where high is better, -1 where low is. Figures: median, least, greatest."""
    change = sign * (new[0] - old[0])
    apart = new[1] > old[2] or new[2] < old[1]
    if not apart or abs(change) <= tolerance * abs(old[0]):
        return ""
    return "better" if change > 0 else "worse"


def _figures(content: Any, name: str = "") -> Iterator[tuple[str, tuple[float, float, float]]]:
    """Every number whose name tells what is better, as (median, least, greatest)."""
    if isinstance(content, dict) and {"median", "min", "max"} <= content.keys():
        if _sign(name):
            yield name, (content["median"], content["min"], content["max"])
    elif isinstance(content, dict):
        for key, inner in content.items():
            if key not in SETTINGS:
                yield from _figures(inner, f"{name}/{key}" if name else key)
    elif isinstance(content, list):
        for number, inner in enumerate(content):
            yield from _figures(inner, f"{name}/{_label(inner, number)}")
    elif isinstance(content, int | float) and not isinstance(content, bool) and _sign(name):
        yield name, (content, content, content)


def _label(entry: Any, number: int) -> str:
    """What tells an entry of a list from the others, if it says so."""
    if not isinstance(entry, dict):
        return str(number)
    parts = [str(entry[key]) for key in LABELS if key in entry]
    return " ".join(parts) or str(number)


def _sign(name: str) -> int:
    """By the last parts of the name first."""
    for part in reversed(name.split("/")):
        if HIGH.search(part):
            return 1
        if LOW.search(part):
            return -1
    return 0


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}") from error
    if not isinstance(content, dict) or "environment" not in content:
        raise UserError(f"{path} is not a benchmark's record")
    return content


if __name__ == "__main__":
    raise SystemExit(exit_code_of(main))
