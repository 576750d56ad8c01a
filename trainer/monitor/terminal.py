"""Output that never ends what it tells of: once its terminal or reader is gone, it is dropped. And what is
said while a run starts, so that nobody waits without knowing what for."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any


def announce(about: str, text: str) -> None:
    """A line of what takes seconds and begins now, in the form of a run's first lines."""
    print(f"{about:<10}  {text}", flush=True)


def keep_quiet(about: str, text: str) -> None:
    """In place of announce."""


@contextmanager
def lasting_output() -> Iterator[None]:
    """sys.stdout and sys.stderr, for the time of the block."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Lasting(sys.stdout), _Lasting(sys.stderr)
    try:
        yield
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        sys.stdout, sys.stderr = before


class _Lasting:
    """A text stream. After the first write that fails its file descriptor leads to nowhere: what others write
    there (C++, the interpreter's last flush) is dropped as well."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except OSError:
            self._let_go()
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._let_go()

    def _let_go(self) -> None:
        with suppress(OSError, ValueError):  # streams without a descriptor
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
