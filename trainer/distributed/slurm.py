"""Processes that srun has started as the tasks of one step: SLURM's variables, read as a launcher's."""

from __future__ import annotations

import os
import re

_OWN_STEPS = 2**32 - 16
_PORTS = range(15000, 30000)  # below those that Linux gives to outgoing connections


def num_tasks() -> int:
    """Of the step that this process is a task of; 1 outside of one. In the script that sbatch runs, variables
    as SLURM_NTASKS are set too, but it is one process: srun alone sets those of a step. SLURM numbers the
    script, and a shell that salloc opens, as steps from 2**32 - 16 on; such a shell may have the job's tasks
    in its variables."""
    if int(os.environ.get("SLURM_STEP_ID", _OWN_STEPS)) >= _OWN_STEPS:
        return 1
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))


def read_step() -> None:
    """Describe the process group of a step of several tasks in the environment, as a launcher does. Nothing
    where a launcher has done it.

    Task 0 runs on the step's first machine, where the ranks meet. The port comes from the numbers of job and
    step, which all tasks know. MASTER_ADDR and MASTER_PORT are kept where they are set.
    """
    environment = os.environ
    if "RANK" in environment or num_tasks() == 1:
        return
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["WORLD_SIZE"] = environment["SLURM_STEP_NUM_TASKS"]
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    counts = _counts(environment["SLURM_STEP_TASKS_PER_NODE"])
    environment["LOCAL_SIZE"] = str(counts[int(environment["SLURM_NODEID"])])
    environment.setdefault("MASTER_ADDR", _first_host(environment["SLURM_STEP_NODELIST"]))
    number = 31 * int(environment["SLURM_JOB_ID"]) + int(environment["SLURM_STEP_ID"])
    environment.setdefault("MASTER_PORT", str(_PORTS[number % len(_PORTS)]))


def sees_its_gpu_alone(num_visible: int) -> bool:
    """Whether SLURM shows this task one GPU out of several, as with --gpus-per-task=1."""
    return num_tasks() > 1 and num_visible == 1 and os.environ.get("SLURM_GPUS_ON_NODE") != "1"


def _first_host(hosts: str) -> str:
    """Of a list as SLURM writes it: node[07-09,12],login -> node07."""
    first = re.split(r",(?![^\[]*\])", hosts)[0]
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", first)


def _counts(text: str) -> list[int]:
    """Tasks of each machine: 4(x2),1 -> 4, 4, 1."""
    found = []
    for count, repeated in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        found += [int(count)] * int(repeated or 1)
    return found
