"""From a recipe's text to a checked configuration, with every mistake in it told."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

from pydantic import ValidationError

from trainer.config.data import Section
from trainer.config.mistakes import explain
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
            key, message = explain(root, dict(problem))
            mistakes.setdefault(key, []).append(message)
        lines = [
            (f"{key}: {' or '.join(m)}" if key else m[0]).replace("\n", "\n  ") for key, m in mistakes.items()
        ]
        raise UserError(
            "\n".join([f"{source} with its overrides:", *(f"  {line}" for line in lines)])
        ) from error
