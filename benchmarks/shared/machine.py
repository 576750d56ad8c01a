"""What a benchmark sets its figures against: memory that was taken, FLOP/s that the machine reaches."""

from __future__ import annotations

import ctypes
import gc
import resource
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional


def forget_peak(device: torch.device, free: bool = False) -> None:
    """Let peak_gb begin anew. free: give freed memory back before; the trainer keeps it on a CPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    if free:
        gc.collect()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
        if trim is not None:
            trim(0)
    with suppress(OSError):  # where a container forbids it, the peak is of the whole process
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # proc(5): resets VmHWM


def peak_gb(device: torch.device) -> float:
    """The most memory since forget_peak: of the device; on a CPU resident, of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 / 1e9 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def peak_flops(device: torch.device, dtype: torch.dtype, repeats: int = 10) -> float:
    """FLOP/s of large matrix products and 3 x 3 convolutions, the faster: on a CPU two libraries do them."""
    large = device.type == "cuda"
    size, images = (8192, 256) if large else (1536, 32)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = 2 * size**3 / min(timed(lambda: a @ b, device) for _ in range(repeats))
    x = torch.randn(images, 256, 28, 28, device=device).to(dtype).to(memory_format=torch.channels_last)
    kernel = torch.randn(256, 256, 3, 3, device=device).to(dtype).to(memory_format=torch.channels_last)
    convolve = partial(functional.conv2d, x, kernel, padding=1)
    flops = 2 * kernel.numel() * images * 28 * 28
    return max(product, flops / min(timed(convolve, device) for _ in range(repeats)))


def wait_for(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of a call, until the device has done what it asks for."""
    wait_for(device)
    begin = time.perf_counter()
    call()
    wait_for(device)
    return time.perf_counter() - begin
