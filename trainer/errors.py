"""Failures that end a run with a message for people instead of a traceback, and the exit code of each.

docs/machines.md has the table of codes. 1 is left for what nobody foresaw, with its traceback.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import sys
from collections.abc import Callable, Iterable, Iterator


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


class ProcessDied(Failure):
    """A process of the run was killed or lost; what was saved before is whole."""

    exit_code = 5


class Finished(Failure):
    """There is nothing left to do."""

    exit_code = 0


class Stopped(Failure):
    """Asked to stop by a signal, after a checkpoint was saved: 128 + the signal's number, as shells count."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was too little, a GPU's or the machine's: libraries have no class in common."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    text = str(error).lower()
    words = ("out of memory", "can't allocate memory", "bad_alloc")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(word in text for word in words)
    )


def is_out_of_space(error: BaseException) -> bool:
    """Whether a disk, or a user's share of it, is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def out_of_memory(error: BaseException, then: str = "") -> EnvironmentFailure:
    """then: what to do once it takes less."""
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return EnvironmentFailure(
        "out of memory: more engine.accumulation_steps and a smaller data.eval_batch_size take less, or a "
        f"smaller data.batch_size in a new run{then} ({first})"
    )


def missing_part(error: ModuleNotFoundError) -> str:
    """The error, with what to install."""
    text = str(error)
    return text if "pip install" in text else f"{text}: pip install 'acdc-train[train]'"


def exit_code_of(run: Callable[[], int]) -> int:
    """What `run` returns; or the code of how it failed, after the message is printed."""
    try:
        return run()
    except Failure as failure:
        print(f"error: {failure}" if failure.exit_code else failure, file=sys.stderr, flush=True)
        return failure.exit_code
    except ModuleNotFoundError as error:
        print(f"error: {missing_part(error)}", file=sys.stderr, flush=True)
        return EnvironmentFailure.exit_code
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        print(f"error: {out_of_memory(error)}", file=sys.stderr, flush=True)
        return EnvironmentFailure.exit_code


LOOK_ALIKE = str.maketrans("OoIl", "0011")


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that was probably meant, also where a letter stands for a digit, or None."""
    looks = {each.translate(LOOK_ALIKE): each for each in known}
    near = difflib.get_close_matches(name.translate(LOOK_ALIKE), looks, n=1)
    return looks[near[0]] if near else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a sentence that says that there is no such name."""
    near = nearest(name, known)
    return f"; did you mean {near!r}?" if near else "."


@contextlib.contextmanager
def as_user_error(where: str) -> Iterator[None]:
    """Turn a ValueError or OSError, met while doing what the user asked, into a UserError, or into an
    EnvironmentFailure where memory or a disk is too small."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise EnvironmentFailure(missing_part(error)) from error
    except (ValueError, OSError) as error:
        if is_out_of_memory(error):
            raise out_of_memory(error) from error
        raise (EnvironmentFailure if is_out_of_space(error) else UserError)(f"{where}: {error}") from error
