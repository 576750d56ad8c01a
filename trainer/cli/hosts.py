"""`acdc train --hostfile`: its machines, and whether the launcher can reach them, before it tries.

DeepSpeed's launcher starts its part on each by pdsh over ssh; where that fails it shows a traceback.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from trainer.errors import EnvironmentFailure, UserError

_SECONDS = 10  # for ssh to reach a machine


def read_hosts(file: str) -> dict[str, int]:
    """Processes by host, from lines `HOST slots=NUMBER`. Raises UserError."""
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"--hostfile {file}: {error}") from error
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.strip().startswith("#"):
            continue
        found = re.fullmatch(r"(\S+)\s+slots=([1-9]\d*)", line.strip())
        if found is None:
            raise UserError(f"--hostfile {file}, line {number}: {line.strip()!r} is not HOST slots=NUMBER")
        if found[1] in hosts:
            raise UserError(f"--hostfile {file}, line {number}: {found[1]} is there twice; add its slots up")
        hosts[found[1]] = int(found[2])
    if not hosts:
        raise UserError(f"--hostfile {file}: it lists no machine; a line each, HOST slots=NUMBER")
    return hosts


def first_address(hosts: dict[str, int]) -> str:
    """The address of the first machine, where the ranks meet; every machine has been reached by then. Raises
    EnvironmentFailure for a program that is missing here, or what is in the way of a machine."""
    for program in ("ssh", "pdsh"):
        if shutil.which(program) is None:
            package = "openssh-client" if program == "ssh" else program
            raise EnvironmentFailure(
                f"--hostfile: the launcher needs {program}, which is not on this machine: apt install "
                f"{package}; without it, torchrun starts the processes of each machine (docs/machines.md)"
            )
    here = f"cd {shlex.quote(os.getcwd())} && test -x {shlex.quote(sys.executable)} && hostname -I"
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={_SECONDS}"]
    calls = {
        host: subprocess.Popen(
            ["ssh", *options, host, here], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for host in hosts
    }
    answers = {host: (*call.communicate(), call.returncode) for host, call in calls.items()}
    for host, (_, complaint, code) in answers.items():
        said = (complaint.strip().splitlines() or [""])[-1]
        if code == 255:  # ssh's own
            raise EnvironmentFailure(
                f"--hostfile: {host} cannot be reached by ssh without a password: {said or 'no reason given'}"
            )
        if code:
            raise EnvironmentFailure(
                f"--hostfile: {host} has no {sys.executable} or no {os.getcwd()}, which must lie at the same "
                f"paths on every machine{said and f': {said}'}"
            )
    host, addresses = next((host, answer[0].split()) for host, answer in answers.items())
    if not addresses:
        raise EnvironmentFailure(f"--hostfile: {host} has no address that `hostname -I` shows")
    return addresses[0]


def for_remote_shell(argument: str) -> str:
    """An argument as DeepSpeed has to get it to arrive unchanged: it sends all as one line for a shell, and
    protects spaces and double quotes alone, by double quotes."""
    if " " in argument:
        return re.sub(r"([\\$`])", r"\\\1", argument)
    return shlex.quote(argument)
