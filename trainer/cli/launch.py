"""`acdc train`: the deepspeed launcher, with a free port, the right devices and an honest exit code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import psutil

from trainer.cli.hosts import first_address, for_remote_shell
from trainer.cli.restarts import Restarts
from trainer.distributed.ranks import choose_accelerator, free_port
from trainer.distributed.signals import SIGNALS
from trainer.errors import ProcessDied, UserError

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


@dataclass(frozen=True)
class Launcher:
    """DeepSpeed's, with options for the machines and devices. environment: its own, where it would misread
    ours. remote: whether it starts processes by the shells of other machines."""

    options: list[str]
    environment: dict[str, str]
    remote: bool = False

    @classmethod
    def here(cls, devices: int) -> Launcher:
        environment = dict(os.environ)
        return cls(_placement(devices, environment), environment)

    @classmethod
    def on_hosts(cls, file: str, hosts: dict[str, int]) -> Launcher:
        """Raises EnvironmentFailure where a host cannot be reached."""
        choose_accelerator()
        options = ["--hostfile", file, "--force_multi", "--no_ssh_check"]
        return cls([*options, "--master_addr", first_address(hosts)], dict(os.environ), remote=True)

    def command(self, module: list[str]) -> list[str]:
        name, *arguments = module
        if self.remote:
            arguments = [for_remote_shell(argument) for argument in arguments]
        start = [sys.executable, "-m", "deepspeed.launcher.runner", "--master_port", str(free_port())]
        return [*start, "--log_level", "critical", *self.options, "--module", name, *arguments]


def launch(launcher: Launcher, restarts: Restarts) -> int:
    """Run the trainer in the launcher's processes, to its end, again and again as `restarts` says. Returns
    the exit code."""
    received: list[int] = []
    try:
        while True:
            code = _run(launcher.command(restarts.arguments()), launcher.environment, received)
            if received:
                return 128 + received[0]
            if not restarts.after(code):
                return code
    finally:
        restarts.close()


def _run(command: list[str], environment: dict[str, str], received: list[int]) -> int:
    """One start of the launcher to the end of all its processes; the exit code.

    The launcher runs in a process group of its own: a signal to us, which is added to `received`, goes to all
    of it, and we end only when it has.
    """
    process = subprocess.Popen(command, start_new_session=True, env=environment)

    def forward(number: int, _: Any) -> None:
        received.append(number)
        impatient = sum(each in (signal.SIGINT, signal.SIGTERM) for each in received) > 1
        if impatient or len(received) == 1:
            _signal_group(process.pid, signal.SIGKILL if impatient else signal.SIGTERM)

    for number in SIGNALS:
        signal.signal(number, forward)
    if received:  # between two starts
        _signal_group(process.pid, signal.SIGTERM)
    code = process.wait()
    if code <= 0 and not received and _alive(process.pid):
        # killed, or its child, which it takes for success: the ranks are left behind
        _signal_group(process.pid, signal.SIGTERM)
        print("error: the launcher was killed; the run saves and stops", file=sys.stderr)
        code = ProcessDied.exit_code
    elif not received and (reason := _reason_of_death(code)):
        print(f"error: {reason}; go on with resume=auto", file=sys.stderr)
        code = ProcessDied.exit_code
    while _alive(process.pid):
        time.sleep(0.1)
    return code


def _reason_of_death(code: int) -> str | None:
    """What the launcher's exit code says of a process that was killed: where a signal ended it, it is minus
    the signal's number, of which the system keeps eight bits. None where no process was."""
    number = -code if code < 0 else 256 - code
    if number not in set(signal.Signals):
        return None
    if number == signal.SIGKILL:
        return "a process was killed (SIGKILL), as the system does where memory is short"
    if number == signal.SIGHUP:  # ssh ends with this code, too
        return "a process, or the connection to a machine, was lost (SIGHUP)"
    return f"a process was ended by {signal.Signals(number).name}"


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
