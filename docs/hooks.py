"""The tables of recipes.md: every field of a recipe, from the models that check it, as the site is built."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from trainer.config.mistakes import sections_of
from trainer.config.schema import Config, Duration

MARKER = re.compile(r"<!-- fields: (.+) -->")
BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
TYPES = {str: "text", int: "integer", float: "number", bool: "truth value", type(None): "null"}


class Row(NamedTuple):
    """key: dotted. default: as a recipe writes it, or "required"."""

    key: str
    type: str
    default: str
    allowed: str
    meaning: str


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for each page. Raises KeyError for a marker that names no section."""
    sections = recipe_fields()
    return MARKER.sub(lambda found: as_table(sections[found[1]]), markdown)


def recipe_fields() -> dict[str, list[Row]]:
    """The fields of every section by its dotted key, those outside sections by "recipe". Where a section is
    of several kinds, the kind is added: "data (ArrayData)"."""
    sections: dict[str, list[Row]] = {}
    _collect(Config, "", "", sections)
    return sections


def _collect(model: type[BaseModel], prefix: str, kind: str, sections: dict[str, list[Row]]) -> None:
    rows = sections.setdefault((prefix.rstrip(".") or "recipe") + kind, [])
    for name, field in model.model_fields.items():
        inner = sections_of(field.annotation)
        for section in inner:
            _collect(section, f"{prefix}{name}.", f" ({section.__name__})" if inner[1:] else "", sections)
        if not inner:
            rows.append(_row(prefix + name, field))


def _row(key: str, field: FieldInfo) -> Row:
    is_duration = bool({*get_args(Duration)} & {*field.metadata})  # pydantic takes it apart
    type_, choices = ("duration", []) if is_duration else _describe(field.annotation)
    default = "required" if field.is_required() else f"`{json.dumps(field.default)}`"
    limits = [
        f"{word} {getattr(bound, name)}"
        for bound in field.metadata
        for name, word in BOUNDS.items()
        if getattr(bound, name, None) is not None
    ]
    patterns = [f"`{bound.pattern}`" for bound in field.metadata if getattr(bound, "pattern", None)]
    return Row(key, type_, default, ", ".join([*choices, *limits, *patterns]), field.description or "")


def _describe(annotation: Any) -> tuple[str, list[str]]:
    """A type in words, and its choices where it has some."""
    if annotation in TYPES:
        return TYPES[annotation], []
    kind, parts = get_origin(annotation), get_args(annotation)
    if kind is Annotated:
        return ("duration", []) if annotation == Duration else _describe(parts[0])
    if kind is Literal:
        return "text", [f"`{choice}`" for choice in parts]
    if kind in (list, dict):
        return f"{'list' if kind is list else 'table'} of {_describe(parts[-1])[0]}", []
    told = [_describe(part) for part in parts]  # of a union
    return " or ".join(type_ for type_, _ in told), [choice for _, choices in told for choice in choices]


def as_table(rows: list[Row]) -> str:
    lines = ["| key | type | default | allowed | meaning |", "|---|---|---|---|---|"]
    for row in rows:
        cells = (cell.replace("|", "\\|") for cell in (f"`{row.key}`", *row[1:]))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
