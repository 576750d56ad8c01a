"""Where data sets lie when no path is given."""

from __future__ import annotations

import os
from pathlib import Path


def data_home() -> Path:
    """$ACDC_DATA, else ~/.cache/acdc-train (below $XDG_CACHE_HOME where that is set)."""
    if home := os.environ.get("ACDC_DATA"):
        return Path(home).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "acdc-train"
