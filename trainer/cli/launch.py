"""`acdc train`: the deepspeed launcher here, with a free port, the right devices and an honest exit code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from typing import Any

import psutil

from trainer.distributed.ranks import choose_accelerator, free_port
from trainer.distributed.signals import SIGNALS
from trainer.errors import UserError

VISIBLE = "CUDA_VISIBLE_DEVICES"


def launch(module: list[str], devices: int | None = None) -> int:
    """Run `module` (its name and arguments) on `devices` processes, default one per visible GPU, one on a
    CPU.

    The launcher runs in a process group of its own: a signal to us goes to all of it, and we end only when it
    has. Returns the exit code. Raises UserError for a number of devices that there are not.
    """
    environment = dict(os.environ)
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--master_port", str(free_port())]
    command += ["--log_level", "critical", *_placement(devices, environment), "--module", *module]
    received: list[int] = []
    process = subprocess.Popen(command, start_new_session=True, env=environment)

    def forward(number: int, _: Any) -> None:
        received.append(number)
        impatient = sum(each in (signal.SIGINT, signal.SIGTERM) for each in received) > 1
        if impatient or len(received) == 1:
            _signal_group(process.pid, signal.SIGKILL if impatient else signal.SIGTERM)

    for number in SIGNALS:
        signal.signal(number, forward)
    code = process.wait()
    if code == 0 and not received and _alive(process.pid):
        # the launcher reports success when its own child was killed, and leaves the ranks behind
        _signal_group(process.pid, signal.SIGTERM)
        code = 1
        print("error: the launcher was killed; the run saves and stops", file=sys.stderr)
    while _alive(process.pid):
        time.sleep(0.1)
    return 128 + received[0] if received else code


def _placement(devices: int | None, environment: dict[str, str]) -> list[str]:
    """The launcher's options for `devices`; changes `environment` where the launcher would misread it."""
    choose_accelerator()
    environment["DS_ACCELERATOR"] = os.environ["DS_ACCELERATOR"]
    if devices is not None and devices < 1:
        raise UserError(f"--devices {devices}: 1 or more")
    if environment["DS_ACCELERATOR"] == "cpu":
        environment[VISIBLE] = ""  # "-1" hides GPUs from torch, but the launcher takes it for a device
        return ["--num_gpus", str(devices or 1)]
    import torch

    available = torch.cuda.device_count()
    if devices is not None and devices > available:
        raise UserError(f"--devices {devices}: this machine shows {available} GPUs")
    visible = environment.get(VISIBLE, "")
    if visible.replace(",", "").isdigit():  # the launcher would take the first GPUs, not the visible ones
        del environment[VISIBLE]
        chosen = visible.split(",")[: devices or available]
        return ["--include", f"localhost:{','.join(chosen)}"]
    return ["--num_gpus", str(devices or available)]


def _signal_group(group: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, number)


def _alive(group: int) -> bool:
    """Whether the process group has a process that still runs; one that nobody has reaped does not."""
    for process in psutil.process_iter(["status"]):
        with suppress(ProcessLookupError):
            if os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE:
                return True
    return False
