"""Where data sets lie when no path is given."""

from __future__ import annotations

import os
from pathlib import Path


def data_home() -> Path:
    """$ACDC_DATA, else ~/.cache/acdc-train (below $XDG_CACHE_HOME where that is set). Raises
    FileNotFoundError for the home of a user that there is not."""
    if home := os.environ.get("ACDC_DATA"):
        try:
            return Path(home).expanduser()
        except RuntimeError as error:
            raise FileNotFoundError(f"ACDC_DATA={home}: there is no such home folder here") from error
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "acdc-train"
