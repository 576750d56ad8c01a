"""Failures that end a run with a message for people instead of a traceback, and the exit code of each."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class Failure(Exception):
    """Ends the program with `exit_code` after its message is printed."""

    exit_code = 1


class UserError(Failure):
    """The user's input or configuration is wrong."""

    exit_code = 2


class EnvironmentFailure(Failure):
    """Something is missing on this machine; the message says what to install or change."""

    exit_code = 3


class Diverged(Failure):
    """Training produced a NaN or infinite loss; the message names the last good checkpoint."""

    exit_code = 4


class Finished(Failure):
    """There is nothing left to do."""

    exit_code = 0


class Stopped(Failure):
    """Asked to stop by a signal, after a checkpoint was saved: 128 + the signal's number, as shells count."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


def missing_part(error: ModuleNotFoundError) -> str:
    """The error, with what to install."""
    text = str(error)
    return text if "pip install" in text else f"{text}: pip install 'acdc-train[train]'"


@contextlib.contextmanager
def as_user_error(where: str) -> Iterator[None]:
    """Turn the ValueError or OSError of a lower floor, met while doing what the user asked, into a
    UserError."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise EnvironmentFailure(missing_part(error)) from error
    except (ValueError, OSError) as error:
        raise UserError(f"{where}: {error}") from error
