"""Where a run comes from: the command that repeats it, its recipe, and what it ran on."""

from __future__ import annotations

import shlex
from typing import Any

from trainer.checkpoints.run_dir import RunDir
from trainer.report.page import folded, listed, section, verbatim
from trainer.report.records import json_of, recipe_of

FILES = ("config.yaml", "env.json", "deepspeed.json", "result.json")


def origin(run_dir: RunDir) -> list[str]:
    """Sections, in HTML."""
    made_on = json_of(run_dir.path / "env.json")
    made_on = made_on if isinstance(made_on, dict) else {}
    texts = ((run_dir.path / name) for name in FILES)
    files = [
        folded(path.name, verbatim(path.read_text(encoding="utf-8", errors="replace")))
        for path in texts
        if path.exists()
    ]
    return [
        section("To repeat it", verbatim(command, "command") if (command := command_of(made_on)) else ""),
        section("Configuration", _lists(_sections(recipe_of(run_dir)))),
        section("Environment", _lists(_environment(made_on))),
        section("Files", *files),
    ]


def command_of(made_on: dict[str, Any]) -> str:
    """What starts such a run again; empty where env.json does not say."""
    given = made_on.get("command")
    words = [*map(str, given[1:])] if isinstance(given, list) else []
    words = [word for word in words if not word.startswith("--local_rank")]
    return f"acdc train {shlex.join(words)}" if words else ""


def hardware_of(made_on: Any) -> str:
    if not isinstance(made_on, dict):
        return ""
    if gpus := made_on.get("gpus"):
        return f"{len(gpus)} x {gpus[0]}"
    cores, cpu = made_on.get("cpu_cores"), made_on.get("cpu")
    return f"{cores} cores of {cpu}" if cores and cpu else ""


def _sections(recipe: dict[str, Any]) -> dict[str, dict[str, str]]:
    """By the first word of their keys; what a recipe leaves out is left out here, too."""
    found: dict[str, dict[str, str]] = {"run": {}}
    for key, value in recipe.items():
        if value is not None and value != []:
            place, _, rest = key.partition(".")
            found.setdefault(place if rest else "run", {})[rest or place] = _text(value)
    return found


def _environment(made_on: dict[str, Any]) -> dict[str, dict[str, str]]:
    packages = made_on.get("packages")
    machine = {
        key.replace("_", " "): _text(value)
        for key, value in made_on.items()
        if key not in ("command", "packages") and value not in (None, [])
    }
    versions = packages if isinstance(packages, dict) else {}
    return {"machine": machine, "packages": {name: _text(each) for name, each in versions.items() if each}}


def _lists(sections: dict[str, dict[str, str]]) -> str:
    lists = "".join(listed(title, values) for title, values in sections.items())
    return f"<div class=lists>{lists}</div>" if lists else ""


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
