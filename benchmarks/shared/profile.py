"""Where a step's time goes: torch.profiler's kernels, sorted into kinds by their names."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

from benchmarks.shared.machine import wait_for

MOST = 40  # kernels that a record names
# The first that is found in a name counts. Kernels of Inductor are named by the operators fused in them: poi
# computes element by element, red and per reduce
KINDS = (
    ("copies", r"memcpy|memset|nchwtonhwc|nhwctonchw|aten::(copy_|clone|contiguous)"),
    ("optimizer", r"multi_tensor|fused_?sgd|foreach"),
    ("pooling", r"pool|triton_(red|per)\w*_mean_|^_gather$"),  # _gather: trainer.models.pool_kernel
    ("BatchNorm", r"triton_(red|per)\w*batch_norm|^(?!triton).*(batch_norm|batchnorm|bn_(fw|bw))"),
    ("element-wise", r"triton_poi|elementwise|aten::(add|mul|sub|div|relu|threshold)"),
    (
        "convolution",
        r"cudnn|cutlass|cublas|implicit|conv|gemm|wgmma|xmma|nvjet|[wd]grad|sm[89]\d_|nhwcaddpadding"
        r"|triton_tem|aten::(add)?mm",
    ),
)
_ANNOTATIONS = re.compile(r"^(## |ProfilerStep|Torch-Compiled Region|CompiledFunction|Optimizer\.|nccl:)")


def kind_of(kernel: str) -> str:
    """By KINDS, or "other"."""
    return next((kind for kind, names in KINDS if re.search(names, kernel, re.IGNORECASE)), "other")


def profile_steps(step: Callable[[], Any], steps: int, device: torch.device) -> dict[str, Any]:
    """What `summary` makes of so many steps. One is taken before, unwatched."""
    on_gpu = device.type == "cuda"
    step()
    wait_for(device)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as watched:
        begin = time.perf_counter()
        for _ in range(steps):
            step()
        wait_for(device)
        wall = time.perf_counter() - begin
    return summary(watched.key_averages(), steps, wall, on_gpu)


def summary(averages: Iterable[Any], steps: int, wall: float, on_gpu: bool) -> dict[str, Any]:
    """shares: of the wall time, by kind; "waiting" is what no kernel fills, on a CPU what is between
    operators. Together they are 1: where kernels overlap and take longer than the wall time, shares are of
    their own time. kernels: the most expensive, in microseconds of a step.

    averages: torch.profiler's key_averages() of `steps` steps, which took `wall` seconds. On a GPU a kernel
    stands there twice or three times: itself, the operator that launched it, with its time, and whatever
    regions are around it (DeepSpeed's, the optimizer's). Only the kernel itself counts."""
    kernels = []
    for event in averages:
        if on_gpu != (event.device_type == DeviceType.CUDA):
            continue
        if event.is_user_annotation or _ANNOTATIONS.match(event.key):
            continue
        seconds = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6
        kernels.append((seconds / steps, event.count / steps, event.key))
    kernels.sort(reverse=True)
    whole = max(wall / steps, sum(seconds for seconds, _, _ in kernels))
    shares = dict.fromkeys([*(kind for kind, _ in KINDS), "other"], 0.0)
    for seconds, _, name in kernels:
        shares[kind_of(name)] += seconds / whole
    shares["waiting"] = max(0.0, 1 - sum(shares.values()))
    table = [
        {"name": name[:300], "kind": kind_of(name), "calls": calls, "microseconds": 1e6 * seconds}
        for seconds, calls, name in kernels[:MOST]
    ]
    return {"step_seconds": wall / steps, "shares": shares, "kernels": table}
