"""python -m tests.torture.moments: a training process that sends itself a signal at a moment named before.

ACDC_MOMENT=KIND:COUNT:SIGNAL[:RANK]   the signal, and the time that something of KIND happens, from 0 on
ACDC_COUNTS=FILE                       as it ends it writes there how often each kind has happened
ACDC_WATCH=FILE                        after each epoch, a line there of what the process holds
ACDC_CORE=NUMBER                       it keeps to this core
"""

from __future__ import annotations

import gc
import io
import json
import os
import resource
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

KINDS = {
    "write": "half of a training state or model is written",
    "file": "a file or folder is synced, renamed or removed: in saves, records, reports",
    "switch": "masks are chosen or lifted, just before or after",
    "step": "the optimizer steps",
    "evaluation": "a batch of an evaluation",
    "record": "an epoch's figures are recorded",
}


class Moments:
    def __init__(self, wanted: str) -> None:
        self.counts: Counter[str] = Counter()
        kind, count, number, *rank = wanted.split(":") if wanted else ("", "0", "0")
        here = os.environ.get("RANK", "0") == (rank[0] if rank else "0")
        self.wanted = (kind, int(count)) if here else None
        self.number = int(number)

    def come(self, kind: str) -> None:
        self.counts[kind] += 1
        if (kind, self.counts[kind] - 1) == self.wanted:
            if self.number:
                os.kill(os.getpid(), self.number)
            else:
                fill(Path(os.environ["ACDC_BALLAST"]))

    def around(self, owner: Any, name: str, kind: str, after: bool = False) -> None:
        """Before each call of a function, and after it as well if told so."""
        original: Callable[..., Any] = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.come(kind)
            result = original(*args, **kwargs)
            if after:
                self.come(kind)
            return result

        setattr(owner, name, wrapped)

    def within_writes(self, checkpoint: Any) -> None:
        original = checkpoint._write

        def half(content: Any, file: Any, name: Path) -> None:
            memory = io.BytesIO()
            original(content, memory, name)
            whole = memory.getvalue()
            file.write(whole[: len(whole) // 2])
            file.flush()
            self.come("write")
            file.write(whole[len(whole) // 2 :])

        checkpoint._write = half


def fill(ballast: Path) -> None:
    """Leave nothing free on its disk, which should be a small one."""
    free = shutil.disk_usage(ballast.parent).free
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, free)


def main(arguments: list[str]) -> int:
    if size := os.environ.get("ACDC_FILE_SIZE"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(size), resource.RLIM_INFINITY))
    if core := os.environ.get("ACDC_CORE"):
        os.sched_setaffinity(0, {int(core)})
    from sparsity import ACDC
    from trainer import train
    from trainer.checkpoints import checkpoint
    from trainer.loop import Trainer
    from trainer.models.classifier import Classifier

    moments = Moments(os.environ.get("ACDC_MOMENT", ""))
    for name in ("fsync", "rename", "replace", "rmdir", "unlink"):
        moments.around(os, name, "file")
    moments.within_writes(checkpoint)
    for name in ("compress", "decompress"):
        moments.around(ACDC, name, "switch", after=True)
    moments.around(Trainer, "train_batch", "step")
    moments.around(Trainer, "record_epoch", "record", after=True)
    forward = Classifier.forward

    def evaluated(self: Any, *args: Any) -> Any:
        if not self.training:
            moments.come("evaluation")
        return forward(self, *args)

    Classifier.forward = evaluated  # type: ignore[method-assign]
    if watched := os.environ.get("ACDC_WATCH"):
        _watch(Trainer, Path(watched))
    code = train.main(arguments)
    if counts := os.environ.get("ACDC_COUNTS"):
        Path(counts).write_text(json.dumps(moments.counts), encoding="utf-8")
    return code


def _watch(trainer: Any, file: Path) -> None:
    """What a process holds: memory in bytes, files, threads, processes of its own."""
    import psutil

    record, me = trainer.record_epoch, psutil.Process()

    def watched(*args: Any) -> None:
        record(*args)
        gc.collect()  # figures and the like refer to themselves: what waits for the collector is no leak
        held = {
            "memory": me.memory_info().rss,
            "files": me.num_fds(),
            "threads": me.num_threads(),
            "processes": len(me.children(recursive=True)),
        }
        with file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(held) + "\n")

    trainer.record_epoch = watched


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
