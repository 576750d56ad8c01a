"""What harms where a file is believed."""

from __future__ import annotations

from typing import Any


class Evil:
    """A pickle of it calls `function` with these arguments where it is believed."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call
