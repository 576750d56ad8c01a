"""`acdc train --max-restarts`: a run whose processes died starts again, from its newest whole checkpoint."""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from pathlib import Path

from trainer.checkpoints.checkpoint import newest_whole
from trainer.errors import ProcessDied

# What nobody foresaw is tried again as well: a file system that was away, a GPU that fell off its bus
CODES = (1, ProcessDied.exit_code)


class Restarts:
    """Which arguments of trainer.train come next.

    The run itself writes the name of its folder to a file: only so is known which run it was, among others of
    its name. The file is in run_root, which all machines share.
    """

    def __init__(self, recipe: str, overrides: list[str], run_root: Path, times: int) -> None:
        self.recipe, self.overrides, self.times = recipe, overrides, times
        self.count = 0
        self.file = run_root / f".started-{os.getpid()}-{time.time_ns()}"

    def arguments(self) -> list[str]:
        note = [f"--run_file={self.file.absolute()}"] if self.times else []
        return ["trainer.train", self.recipe, *self.overrides, *note]

    def after(self, code: int) -> bool:
        """Whether to start again after this exit code; arguments() then has the checkpoint to go on from."""
        if code not in CODES or self.count == self.times:
            return False
        self.count += 1
        folder = None
        with suppress(OSError, UnicodeDecodeError):
            folder = Path(self.file.read_text(encoding="utf-8"))
        point = newest_whole(folder / "checkpoints") if folder is not None else None
        if point is not None:
            kept = [each for each in self.overrides if not each.startswith("resume=")]
            self.overrides = [*kept, f"resume={folder}"]
        where = f"from {point}" if point is not None else "from its beginning: no checkpoint was saved"
        print(f"restart {self.count} of {self.times}, {where}", file=sys.stderr, flush=True)
        return True

    def close(self) -> None:
        with suppress(OSError):  # none was written, or run_root is not even a folder
            self.file.unlink()
