"""The processes of one run: who am I, which device is mine, and the few things that ranks tell each other."""

from __future__ import annotations

import atexit
import logging
import os
import socket
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from data.places import data_home
from trainer.distributed import slurm
from trainer.distributed.host_memory import retain_freed_memory
from trainer.errors import EnvironmentFailure, Failure

T = TypeVar("T")

log = logging.getLogger(__name__)


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def local_size() -> int:
    """Ranks of this run on this machine, as the deepspeed launcher says it, or torchrun."""
    return int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)


def num_cores() -> int:
    """Cores that this rank has for itself. SLURM may have bound each task to its own, or none to any."""
    usable = len(os.sched_getaffinity(0))
    shared = int(os.environ.get("SLURM_CPUS_ON_NODE") or usable)
    return max(1, min(usable, shared // local_size()))


def is_main() -> bool:
    return rank() == 0


def free_port() -> int:
    """A port nobody listens on. The launcher's own default clashes when two runs share a machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start() -> torch.device:
    """Join the process group that the launcher described, or be alone without one; this rank's device."""
    deepspeed = import_deepspeed()
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_SIZE="1")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    _keep_compiled_graphs()
    if torch.cuda.is_available():
        if slurm.sees_its_gpu_alone(torch.cuda.device_count()):
            os.environ["LOCAL_RANK"] = "0"  # among the devices that it sees; DeepSpeed reads it as well
        if local_rank() >= torch.cuda.device_count():
            raise EnvironmentFailure(
                f"this machine shows {torch.cuda.device_count()} GPUs, too few for device {local_rank()}; "
                "ask for fewer with --devices (with deepspeed: --num_gpus)"
            )
        device = torch.device("cuda", local_rank())
        torch.cuda.set_device(device)
        # Streams of other libraries, a JPEG decoder's among them, wait for CUDA's default stream and hold it
        # up. In one of its own a step from files is 3 to 12 % faster: benchmarks/results/gpu/files.json
        torch.cuda.set_stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]
    else:
        device = torch.device("cpu")
        retain_freed_memory()
        torch.set_num_threads(num_cores())
    if not dist.is_initialized():
        try:
            deepspeed.init_distributed("nccl" if device.type == "cuda" else "gloo", verbose=False)
        except dist.DistError as error:
            place = f"{os.environ['MASTER_ADDR']}, port {os.environ['MASTER_PORT']}"
            raise EnvironmentFailure(
                f"the ranks of this run cannot meet at {place}: {str(error).splitlines()[0]}"
            ) from error
        atexit.register(dist.destroy_process_group)
    return device


def threads() -> int:
    """That this rank computes with on a CPU: how many rounds its sums. 0 on a GPU."""
    return 0 if torch.cuda.is_available() else torch.get_num_threads()


def keep_threads(before: int) -> None:
    """Compute with as many threads as a run did so far, where there are cores for them. 0: not known."""
    here = threads()
    if 0 < before < here:
        torch.set_num_threads(before)
        log.info(
            "%d threads compute, as in the run so far, though there are cores for %d: another number rounds "
            "sums otherwise",
            before,
            here,
        )
    elif 0 < here < before:
        log.warning(
            "the run computed with %d threads so far and goes on with %d, for which there are cores here: "
            "sums round otherwise, so it will not equal the uninterrupted run bit for bit",
            before,
            here,
        )


def _keep_compiled_graphs() -> None:
    """Let torch.compile keep its results beside the data sets, where they outlast a restart, unlike /tmp. By
    the CPU's vector instructions: torch 2.13 takes code for wider ones from a shared home, and fails in
    it."""
    try:
        folder = data_home() / "compiled" / torch.backends.cpu.get_cpu_capability().replace(" ", "-")
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if os.access(folder, os.W_OK):
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))


def choose_accelerator() -> None:
    """Tell DeepSpeed, here and in child processes, what to run on; it warns where it has to find out."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")


def import_deepspeed() -> Any:
    """DeepSpeed, without its banner and without compiling its shared-memory operator.

    On a CPU that operator costs 40 s of C++ compilation at the first start; gloo does its work.
    """
    choose_accelerator()
    try:
        import deepspeed
        from deepspeed.ops import __compatible_ops__ as operators
    except ModuleNotFoundError as error:
        raise EnvironmentFailure(
            f"training needs DeepSpeed: pip install 'acdc-train[train]' ({error})"
        ) from error
    deepspeed.utils.logger.setLevel("ERROR")
    # DeepSpeed 0.19.8 under torch 2.13, at every start with ZeRO-1/2
    warnings.filterwarnings("ignore", ".*all_gather_into_tensor. is deprecated", FutureWarning)
    operators["deepspeed_shm_comm"] = False
    return deepspeed


def is_loss_of_another(error: Exception) -> bool:
    """Whether a collective call failed because another rank is gone; gloo has no class for that."""
    words = ("Connection closed by peer", "Connection reset by peer", "gloo")
    return world_size() > 1 and (
        isinstance(error, dist.DistError) or any(word in str(error) for word in words)
    )


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def on_main(function: Callable[[], T]) -> T:
    """Call `function` on rank 0; its value on every rank, and so a Failure that it raises."""
    box: list[Any] = [None, None]
    if is_main():
        try:
            box[0] = function()
        except Failure as failure:
            box[1] = failure
    if world_size() > 1:
        dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    return box[0]


def all_gather(value: T) -> list[T]:
    """Every rank's value, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def average_buffers(module: torch.nn.Module) -> None:
    """Make BatchNorm statistics the mean over ranks, so that all of them evaluate one model."""
    if world_size() == 1:
        return
    for buffer in module.buffers():
        if buffer.is_floating_point():
            buffer.copy_(sum_over_ranks(buffer.detach().clone()) / world_size())
