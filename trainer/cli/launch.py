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


def count_devices(wanted: int | None) -> int:
    """How many processes `--devices` means here, default one per visible GPU, one on a CPU. Raises UserError
    for more than there are GPUs, or cores on a CPU."""
    if wanted is not None and wanted < 1:
        raise UserError(f"--devices {wanted}: 1 or more")
    choose_accelerator()
    if os.environ["DS_ACCELERATOR"] == "cpu":
        available, kind, wanted = os.cpu_count() or 1, "cores", wanted or 1
    else:
        import torch

        available, kind = torch.cuda.device_count(), "GPUs"
    if wanted is not None and wanted > available:
        raise UserError(f"--devices {wanted}: this machine shows {available} {kind}")
    return wanted or available


def launch(module: list[str], devices: int) -> int:
    """Run `module` (its name and arguments) on `devices` processes here.

    The launcher runs in a process group of its own: a signal to us goes to all of it, and we end only when it
    has. Returns the exit code.
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


def _placement(devices: int, environment: dict[str, str]) -> list[str]:
    """The launcher's options for `devices`; changes `environment` where the launcher would misread it."""
    environment["DS_ACCELERATOR"] = os.environ["DS_ACCELERATOR"]
    if environment["DS_ACCELERATOR"] == "cpu":
        environment[VISIBLE] = ""  # "-1" hides GPUs from torch, but the launcher takes it for a device
        return ["--num_gpus", str(devices)]
    visible = environment.get(VISIBLE, "")
    if visible.replace(",", "").isdigit():  # the launcher would take the first GPUs, not the visible ones
        del environment[VISIBLE]
        return ["--include", f"localhost:{','.join(visible.split(',')[:devices])}"]
    return ["--num_gpus", str(devices)]


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
