"""What a benchmark sets its figures against: memory that was taken, FLOP/s that the machine reaches."""

from __future__ import annotations

import ctypes
import gc
import itertools
import resource
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from sparsity.kernels.unstructured import library


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


# As many sums as hide how long a multiply-add takes, few enough for registers, none equal to another
_FMA = """
typedef float Vector __attribute__((vector_size(BYTES)));
extern "C" float multiply_add(long rounds, float factor) {
    Vector sums[SUMS];
    for (int index = 0; index < SUMS; ++index) sums[index] = Vector{} + factor * index;
    for (long round = 0; round < rounds; ++round)
        for (Vector& sum : sums) sum = sum * factor + factor;
    float total = 0;
    for (Vector& sum : sums) total += sum[0];
    return total;
}
"""


def fma_flops(repeats: int = 5) -> float:
    """FLOP/s of multiply-adds of float32 vectors that stay in registers, on torch's threads. A compiler and
    instructions as sparse kernels have them.
    Raises subprocess.CalledProcessError."""
    sums, rounds, threads, lanes = 12, 10_000_000, torch.get_num_threads(), library.vector_bytes() // 4
    command = [library.find_compiler() or "g++", *library.FLAGS, *library.instructions()]
    command += [f"-DBYTES={4 * lanes}", f"-DSUMS={sums}", "-x", "c++", "-", "-o"]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([*command, f"{folder}/fma.so"], input=_FMA, text=True, check=True)
        multiply_add = ctypes.CDLL(f"{folder}/fma.so").multiply_add
    multiply_add.argtypes, multiply_add.restype = (ctypes.c_long, ctypes.c_float), ctypes.c_float
    with ThreadPoolExecutor(threads) as pool:  # a call by ctypes lets other threads run

        def all_threads() -> None:
            list(pool.map(lambda _: multiply_add(rounds, 0.5), range(threads)))

        seconds = min(timed(all_threads, torch.device("cpu")) for _ in range(repeats))
    return 2 * sums * lanes * rounds * threads / seconds


def wait_for(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Stopwatch:
    """Points in time as the device meets them: on a GPU events, for which nothing waits; else the clock."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._marks: list[Any] = []

    def mark(self) -> None:
        """The device gets here once it has done what it was given before."""
        if self.device.type == "cuda":
            event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def laps(self) -> list[float]:
        """Seconds from each mark to the next. Waits for the device."""
        wait_for(self.device)
        pairs = itertools.pairwise(self._marks)
        if self.device.type == "cuda":
            return [begin.elapsed_time(end) / 1000 for begin, end in pairs]
        return [end - begin for begin, end in pairs]


def timed(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of a call, until the device has done what it asks for."""
    wait_for(device)
    begin = time.perf_counter()
    call()
    wait_for(device)
    return time.perf_counter() - begin
