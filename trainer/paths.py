"""Paths as users write them."""

from __future__ import annotations

from pathlib import Path

from trainer.errors import UserError


def user_path(text: str | Path) -> Path:
    """With ~ and ~name at its beginning expanded. Raises UserError where there is no such user."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        who = Path(text).parts[0]
        raise UserError(f"{text}: there is no home folder {who} here; write the path without it") from error
