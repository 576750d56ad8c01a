"""From a recipe's text to a checked configuration, and every mistake in it explained."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin

from pydantic import ValidationError

from trainer.config.data import Section
from trainer.config.recipes import find_recipe, override, read_recipe
from trainer.config.schema import Config
from trainer.errors import UserError

S = TypeVar("S", bound=Section)


def load_config(recipe: str, assignments: Iterable[str] = ()) -> Config:
    """Read a recipe by name or path and apply overrides. Raises UserError that lists every mistake found."""
    path = find_recipe(recipe)
    content = read_recipe(path)
    content.setdefault("name", path.stem)
    override(content, assignments)
    return parse(Config, content, str(path))


def parse(root: type[S], content: dict[str, Any], source: str) -> S:
    """A checked Config or EvalConfig. source: where the content came from. Raises UserError."""
    try:
        return root.model_validate(content)
    except ValidationError as error:
        mistakes: dict[str, list[str]] = {}
        for problem in error.errors():
            key, message = _explain(root, dict(problem))
            mistakes.setdefault(key, []).append(message)
        lines = [
            (f"{key}: {' or '.join(m)}" if key else m[0]).replace("\n", "\n  ") for key, m in mistakes.items()
        ]
        raise UserError(
            "\n".join([f"{source} with its overrides:", *(f"  {line}" for line in lines)])
        ) from error


def _explain(root: type[Section], problem: dict[str, Any]) -> tuple[str, str]:
    """The dotted key of one mistake, and what is wrong there, what is allowed, the nearest valid key."""
    location = _location(problem)
    key = ".".join(map(str, location))
    if problem["type"] == "union_tag_not_found":
        return f"{key}.name", f"missing; one of {', '.join(_data_names())}"
    if problem["type"] == "union_tag_invalid":
        name = problem["input"].get("name") if isinstance(problem["input"], dict) else problem["input"]
        near = difflib.get_close_matches(str(name), _data_names(), n=1)
        hint = f" did you mean {near[0]}?" if near else ""
        return f"{key}.name", f"no data set {name!r};{hint} one of {', '.join(_data_names())}"
    if problem["type"] == "extra_forbidden":
        allowed = list(_section_at(root, location[:-1], problem).model_fields)
        near = difflib.get_close_matches(str(location[-1]), allowed, n=1)
        hint = f" did you mean {'.'.join([*map(str, location[:-1]), near[0]])}?" if near else ""
        return key, f"unknown key;{hint} allowed here: {', '.join(allowed)}"
    if problem["type"] == "missing":
        field = _section_at(root, location[:-1], problem).model_fields[location[-1]]
        return key, f"missing; {field.description or 'give a value'}"
    if problem["type"] == "value_error":
        return key, problem["msg"].removeprefix("Value error, ")
    return key, f"{problem['msg'].removeprefix('Input ')}, not {problem['input']!r}"


def _location(problem: dict[str, Any]) -> list[Any]:
    """Where the mistake is, without the parts that pydantic puts in for the members of a union."""
    parts = list(problem["loc"])
    if parts[:1] == ["data"] and len(parts) > 1 and parts[1] in _data_names():
        del parts[1]
    named = problem["type"] in ("extra_forbidden", "missing")  # then the last part is a key
    if not named and parts and parts[-1] in ("bool", "int", "float", "str", "literal['auto']"):
        parts.pop()
    return parts


def _section_at(root: type[Section], location: list[Any], problem: dict[str, Any]) -> type[Section]:
    section = root
    for part in location:
        inner = section.model_fields[part].annotation
        if get_origin(inner) is UnionType:  # a section or none; or the kinds of data, told apart by name
            kinds = [kind for kind in get_args(inner) if kind is not NoneType]
            inner = kinds[0]
            if len(kinds) > 1:
                tag = problem["loc"][problem["loc"].index(part) + 1]
                inner = next(kind for kind in kinds if tag in get_args(kind.model_fields["name"].annotation))
        assert isinstance(inner, type)
        assert issubclass(inner, Section)
        section = inner
    return section


def _data_names() -> list[str]:
    """What `data.name` may be."""
    kinds = get_args(Config.model_fields["data"].annotation)
    return [name for kind in kinds for name in get_args(kind.model_fields["name"].annotation)]
