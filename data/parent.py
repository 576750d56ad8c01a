"""Worker processes that end with the process that started them, however that ended."""

from __future__ import annotations

import multiprocessing
import os
import threading


def end_with_parent() -> None:
    """Call once in a process of multiprocessing, of any start method. A forkserver's children would wait for
    ever with a result that nobody takes."""
    threading.Thread(target=_wait, daemon=True).start()


def _wait() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
    os._exit(1)
