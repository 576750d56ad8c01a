"""What SLURM's variables say of a process; tests/trainer/cli/test_cluster.py starts such processes."""

import os

import pytest

from tests.trainer.runs import OF_A_RANK
from trainer.distributed import ranks, slurm

STEP = {  # what srun sets in task 3 of 5, on the second of three machines
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_NODELIST": "gpu[07-08,11],login",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_PROCID": "3",
    "SLURM_NODEID": "1",
    "SLURM_LOCALID": "1",
}


@pytest.fixture
def task():
    """A function that sets these variables, and no other of SLURM's and ours; they go after the test."""
    saved = dict(os.environ)
    for key in list(os.environ):
        if key.startswith("SLURM_") or key in (*OF_A_RANK, "LOCAL_WORLD_SIZE"):
            del os.environ[key]
    yield os.environ.update
    os.environ.clear()
    os.environ.update(saved)


def ours() -> dict[str, str]:
    return {key: os.environ[key] for key in OF_A_RANK if key in os.environ}


def test_a_task_of_a_step_is_a_rank(task):
    task(STEP)
    slurm.read_step()
    assert ours() == {
        "RANK": "3",
        "WORLD_SIZE": "5",
        "LOCAL_RANK": "1",
        "LOCAL_SIZE": "2",
        "MASTER_ADDR": "gpu07",
        "MASTER_PORT": str(15000 + (31 * 1234 + 2) % 15000),
    }


def test_the_script_of_a_job_is_one_process(task):
    """sbatch sets variables of the same names there, but none of a step."""
    job = {key: value for key, value in STEP.items() if not key.startswith("SLURM_STEP")}
    task(job | {"SLURM_NTASKS": "5", "SLURM_TASKS_PER_NODE": "2(x2),1"})
    slurm.read_step()
    assert ours() == {}
    assert slurm.num_tasks() == 1


@pytest.mark.parametrize(
    "others",
    [
        {"SLURM_STEP_NUM_TASKS": "1"},
        {"RANK": "0", "WORLD_SIZE": "4"},
        {"SLURM_STEP_ID": str(2**32 - 6)},  # a shell that salloc opened
    ],
)
def test_a_single_task_and_a_launchers_process_stay_what_they_are(task, others):
    task(STEP | others)
    before = ours()
    slurm.read_step()
    assert ours() == before


def test_an_address_of_the_users_own_is_kept(task):
    task(STEP | {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "4000"})
    slurm.read_step()
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("10.0.0.7", "4000")


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("login", "login"),
        ("a,b", "a"),
        ("node[3,5-9]", "node3"),
        ("node-[0012-0040],x", "node-0012"),
        ("r[1-2]n[03,04].site,y", "r1n03.site"),
    ],
)
def test_the_first_of_slurms_host_lists(hosts, first):
    assert slurm._first_host(hosts) == first


@pytest.mark.parametrize(
    ("visible", "on_node", "alone"), [(1, "4", True), (1, None, True), (1, "1", False), (4, "4", False)]
)
def test_a_task_that_is_shown_one_gpu_of_several_takes_it(task, visible, on_node, alone):
    task(STEP)
    if on_node is not None:
        task({"SLURM_GPUS_ON_NODE": on_node})
    assert slurm.sees_its_gpu_alone(visible) is alone
    del os.environ["SLURM_STEP_ID"]
    assert not slurm.sees_its_gpu_alone(visible)


@pytest.mark.parametrize(
    ("usable", "variables", "cores"),
    [
        (8, {}, 8),
        (8, {"LOCAL_SIZE": "4"}, 2),
        (8, {"LOCAL_WORLD_SIZE": "4"}, 2),  # torchrun's word
        (2, {"LOCAL_SIZE": "4", "SLURM_CPUS_ON_NODE": "8"}, 2),  # each task bound to its own
        (64, {"LOCAL_SIZE": "4", "SLURM_CPUS_ON_NODE": "8"}, 2),  # none bound, the job's share of the machine
        (2, {"LOCAL_SIZE": "4"}, 1),
    ],
)
def test_the_cores_of_a_rank(task, monkeypatch, usable, variables, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(usable)))
    task(variables)
    assert ranks.num_cores() == cores
