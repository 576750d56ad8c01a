"""Recipes with nonsense in them: each is taken, or refused in a sentence."""

from __future__ import annotations

import random
import string
from collections.abc import Iterator
from typing import Any

from trainer.config.load import load_config
from trainer.config.recipes import recipe_names
from trainer.config.schema import Config
from trainer.errors import UserError

VALUES = (
    *("", "null", "true", "0", "-1", "1e309", "nan", ".inf", "99999999999999999999", "0x1F", "1_000"),
    *("[]", "{}", "[1, [2]]", "{a: {b: c}}", "!!timestamp x", "!!binary x", "&a [*a]", "2020-01-01", "'"),
    *("\x00", "~nobody/x", "../..", "/dev/null", "dense", "dense 0", "(dense 1) x99999", "sparse 1e9"),
    *("2:4", "4:2", "0:0", "é", "🙂", "a" * 5000, "1ep", "1st", "-1ep", "99999999999ep"),
)


def recipes(count: int, generator: random.Random) -> Iterator[bool]:
    """For each of `count` recipes with random overrides: whether it was taken or refused, not broken off."""
    keys = list(_keys(Config.model_json_schema()))
    names = recipe_names()
    for _ in range(count):
        overrides = [f"{_key(keys, generator)}={_value(generator)}" for _ in range(generator.randint(1, 4))]
        try:
            load_config(generator.choice(names), overrides)
        except UserError:
            pass
        except Exception as error:
            print(f"{overrides}: {error!r}")
            yield False
            continue
        yield True


def _keys(schema: dict[str, Any]) -> Iterator[str]:
    """Dotted keys of all sections."""
    for name, section in schema.get("$defs", {}).items():
        for key in section.get("properties", {}):
            yield f"{name.removesuffix('Config').lower()}.{key}"
    yield from schema["properties"]
    for key in schema["properties"]:
        yield from (f"{key}.{inner}" for inner in ("name", "lr", "target", "schedule", "every", "root", "x"))


def _key(keys: list[str], generator: random.Random) -> str:
    key = generator.choice(keys)
    if generator.random() < 0.1:
        place = generator.randrange(len(key) + 1)
        key = key[:place] + generator.choice(string.printable) + key[place:]
    return key


def _value(generator: random.Random) -> str:
    if generator.random() < 0.7:
        return generator.choice(VALUES)
    return "".join(generator.choices(string.printable, k=generator.randint(1, 12)))
