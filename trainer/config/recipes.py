"""Recipe files: finding them, reading YAML without its traps, applying key=value overrides."""

from __future__ import annotations

import os
import re
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from trainer.errors import UserError, did_you_mean

RECIPES = Path(__file__).resolve().parents[2] / "configs"
_MOST_VALUES = 100_000  # of a text, each alias counted as what it stands for


class _Loader(yaml.SafeLoader):
    """YAML 1.1 without its traps: 1e-4 is a number, 2:4 is a text (not 124), 010 is ten, only true and false
    are truth values, and a key given twice is an error."""

    yaml_implicit_resolvers = {  # noqa: RUF012  PyYAML's own name
        first: [
            (tag, pattern)
            for tag, pattern in resolvers
            if tag.split(":")[-1] not in ("bool", "int", "float", "timestamp")
        ]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def get_single_node(self) -> yaml.Node | None:
        """Raises ConstructorError for aliases that make a short text endless, before anything is built."""
        node = super().get_single_node()
        if node is not None and _size(node, {}) > _MOST_VALUES:
            raise yaml.constructor.ConstructorError(
                None, None, f"its aliases stand for more than {_MOST_VALUES:,} values", node.start_mark
            )
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Values in it, those of an alias each time that it is written."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if (size := known.get(id(node))) is not None:
        return size
    known[id(node)] = _MOST_VALUES  # found again within itself: endless
    inner = [part for each in node.value for part in (each if isinstance(each, tuple) else (each,))]
    known[id(node)] = size = 1 + sum(_size(part, known) for part in inner)
    return size


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?\d+(_\d+)*", "-+0123456789"),
    (
        "float",
        r"[-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))
_Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value))


class _Dumper(yaml.SafeDumper):
    """Quotes every text that _Loader, or plain YAML, would read as something else."""

    yaml_implicit_resolvers = {  # noqa: RUF012  PyYAML's own name
        first: [
            *yaml.SafeDumper.yaml_implicit_resolvers.get(first, []),
            *_Loader.yaml_implicit_resolvers.get(first, []),
        ]
        for first in {*yaml.SafeDumper.yaml_implicit_resolvers, *_Loader.yaml_implicit_resolvers}
    }


def dump_recipe(content: Mapping[str, Any]) -> str:
    """YAML text that read_recipe reads back as the same."""
    return yaml.dump(dict(content), Dumper=_Dumper, sort_keys=False, width=110)


def _parse(text: str) -> Any:
    """Raises ValueError for whatever PyYAML makes of text that it cannot read."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(str(error)) from error


def read_yaml(path: Path) -> Any:
    """A YAML file's content, without YAML's traps. Raises OSError or ValueError that names file and line."""
    try:
        return _parse(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def find_recipe(name: str) -> Path:
    """A recipe's path from its name under configs/ ("quickstart") or from a path. Raises UserError."""
    return _find(name, Path(), f"no recipe {name!r}: neither a file nor a name under configs/")


def _find(name: str, folder: Path, mistake: str) -> Path:
    """A recipe by its path from `folder`, or by its name under configs/. Raises UserError, which begins with
    `mistake`, where there is none."""
    for candidate in (folder / name, RECIPES / name, RECIPES / f"{name}.yaml"):
        if os.path.isfile(candidate):  # of a name that no file can have Path.is_file raises
            return candidate
    known = recipe_names()
    raise UserError(f"{mistake}{did_you_mean(name, known)} One of: {', '.join(known)}")


def read_recipe(path: Path, below: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The mapping in a YAML file, over that of its `base`: a path beside it, or a name under configs/. Raises
    UserError naming file and line.

    below: the files that named this one as their base.
    """
    try:
        content = read_yaml(path)
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from error
    if not isinstance(content, dict):
        raise UserError(
            f"{path}: a recipe is a mapping of keys to values, this is a {type(content).__name__}"
        )
    base = content.pop("base", None)
    if base is None:
        return content
    if not isinstance(base, str):
        raise UserError(
            f"{path}: base {base!r} is neither a path beside the recipe nor a name under configs/"
        )
    mistake = f"{path}: base {base!r} is neither a file beside it nor a name under configs/"
    under = _find(base, path.parent, mistake)
    chain = (*below, path.resolve())
    if under.resolve() in chain:
        raise UserError(f"{path}: base {base!r} leads back to itself")
    return _merge(read_recipe(under, chain), content)


def _merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` on top of `under`, section by section; lists and values are replaced."""
    merged = dict(under)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def recipe_names() -> list[str]:
    """The recipes under configs/, without the bases, whose names begin with an underscore."""
    paths = (path.relative_to(RECIPES).with_suffix("") for path in RECIPES.rglob("*.yaml"))
    return sorted(path.as_posix() for path in paths if not path.name.startswith("_"))


def override(content: dict[str, Any], assignments: Iterable[str]) -> None:
    """Apply "dotted.key=value" assignments in place; values are read as YAML. Raises UserError."""
    assignments = list(assignments)
    for i, assignment in enumerate(assignments):
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            key, *values = [assignment.rstrip(":="), *(each for each in assignments[i + 1 :] if each != "=")]
            apart = bool(key and values) and "=" not in values[0]
            meant = f"; did you mean {key}={values[0]}?" if apart else ", e.g. optimizer.lr=0.1"
            raise UserError(f"{assignment!r} is not an override: write key=value{meant}")
        if not text.strip():
            raise UserError(f"{assignment!r} gives no value; for none write {key}=null")
        try:
            value = _parse(text)
        except ValueError as error:
            raise UserError(f"the value of {assignment!r} cannot be read: {error}") from error
        *parents, last = key.split(".")
        section = content
        for parent in parents:
            child = section.setdefault(parent, {})
            if child is None:
                child = section[parent] = {}
            if not isinstance(child, dict):
                raise UserError(f"{assignment!r}: {parent!r} holds {child!r}, which has no keys below it")
            section = child
        section[last] = value
