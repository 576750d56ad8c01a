"""What is wrong in a recipe or an override, and what would have been right."""

from __future__ import annotations

import contextlib
import re
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

from trainer.config.data import Section
from trainer.config.schema import Config
from trainer.errors import LOOK_ALIKE, nearest

MEANT = {  # where a value is given for a whole section
    "lr": "optimizer.lr",
    "sparsity": "sparsity.target",
    "model": "model.name",
    "optimizer": "optimizer.name",
    "data": "data.name",
    "ema": "ema.decay",
}
SYNONYMS = {
    "float16": "fp16",
    "half": "fp16",
    "bfloat16": "bf16",
    "float32": "fp32",
    "32": "fp32",
    "cuda": "gpu",
    "randaugment": "rand",
    "ra": "rand",
    "trivialaugment": "trivial",
    "ta_wide": "trivial",
}


def explain(root: type[Section], problem: dict[str, Any]) -> tuple[str, str]:
    """The dotted key of one mistake that pydantic found, and what is wrong there, what is allowed and, where
    it can be guessed, what would have been right."""
    location = _location(problem)
    key = ".".join(map(str, location))
    if problem["type"] == "union_tag_not_found":
        return f"{key}.name", f"missing; one of {', '.join(_data_names())}"
    if problem["type"] == "union_tag_invalid":
        name = problem["input"].get("name") if isinstance(problem["input"], dict) else problem["input"]
        near = nearest(str(name), _data_names())
        hint = f" did you mean {near}?" if near else ""
        return f"{key}.name", f"no data set {name!r};{hint} one of {', '.join(_data_names())}"
    if problem["type"] == "extra_forbidden":
        allowed = list(_section_at(root, location[:-1], problem).model_fields)
        near = nearest(str(location[-1]).strip(), allowed)
        keys = [".".join([*map(str, location[:-1]), near])] if near else []
        keys = keys or (_elsewhere(root, key) if len(location) == 1 else [])
        hint = f" did you mean {' or '.join(keys)}?" if keys else ""
        return key, f"unknown key;{hint} allowed here: {', '.join(allowed)}"
    if problem["type"] == "missing":
        field = _section_at(root, location[:-1], problem).model_fields[location[-1]]
        return key, f"missing; {field.description or 'give a value'}"
    if problem["type"] == "value_error":
        return key, problem["msg"].removeprefix("Value error, ")
    value, text = problem["input"], problem["msg"].removeprefix("Input ")
    if problem["type"] == "model_type":
        fields = list(_section_at(root, location, problem).model_fields)
        text = f"a section with the keys {', '.join(fields)}"
        hint = f" did you mean {MEANT[key]}={value}?" if key in MEANT else f" write {key}.KEY=VALUE"
        return key, f"{text}, not {value!r};{hint}"
    meant = _value_meant(problem)
    hint = "" if meant is None else f"; did you mean {key}={meant}?"
    return key, f"{text}, not {value!r}{hint}"


def _elsewhere(root: type[Section], key: str) -> list[str]:
    """The dotted keys, in sections of the root, that are or nearly are such a key."""
    found: dict[str, list[str]] = {}
    for section in root.model_fields:
        for kind in sections_of(root.model_fields[section].annotation):
            for name in kind.model_fields:
                homes = found.setdefault(name, [])
                homes += [] if f"{section}.{name}" in homes else [f"{section}.{name}"]
    near = nearest(key, found)
    return found[near] if near else []


def sections_of(annotation: Any) -> list[type[Section]]:
    """The sections that a field of such a type may hold."""
    members = get_args(annotation) or (annotation,)
    return [each for each in members if isinstance(each, type) and issubclass(each, Section)]


def _value_meant(problem: dict[str, Any]) -> str | None:
    """What was probably meant by a value of the wrong kind, as one would write it."""
    value, kind = problem["input"], problem["type"]
    if kind == "list_type" and isinstance(value, str):
        return f"[{value}]"
    if kind == "literal_error" and isinstance(value, str):
        allowed = re.findall(r"'([^']*)'", problem["ctx"]["expected"])
        synonym = SYNONYMS.get(value.lower())
        return synonym if synonym in allowed else nearest(value, allowed)
    if kind == "less_than" and problem["ctx"]["lt"] == 1 and isinstance(value, int | float) and value < 100:
        return f"{value / 100:g}"  # a share in percent
    if kind in ("float_type", "int_type", "float_parsing", "int_parsing") and isinstance(value, str):
        number = value.strip().removesuffix("%").replace(",", ".").translate(LOOK_ALIKE)
        with contextlib.suppress(ValueError):
            return f"{float(number) / (100 if '%' in value else 1):g}"
    return None


def meant_by_options(words: list[str]) -> str:
    """What was probably meant by words that are no options: "--optimizer.lr=0.1" or "--batch-size 64"."""
    meant = []
    for word in words:
        if word.startswith("-"):
            key, equals, value = word.lstrip("-").partition("=")
            key = key.replace("-", "_")
            homes = [key] if "." in key else _elsewhere(Config, key)
            meant.append((homes or [key])[0] + equals + value)
        elif meant and "=" not in meant[-1] and "=" not in word:
            meant[-1] += f"={word}"
        else:
            meant.append(word)
    return " ".join(meant)


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
