"""Two machines: the scripts of docs/machines.md, and a host file, with stand-ins for a cluster's commands.

The machines are two loopback addresses; processes, connections between them, signals and files are real.
"""

import json
import os
import re
import shlex
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from tests.trainer.runs import command, environment_of_its_own, tiny, wait_for_step
from tests.trainer.stand_ins import install
from trainer.distributed.ranks import free_port

pytestmark = [pytest.mark.usefixtures("needs_runs"), pytest.mark.launch, pytest.mark.slow]

PAGE = Path(__file__).parents[3] / "docs" / "machines.md"
SHORT = ["epochs=2", "sparsity.schedule=dense 1, sparse 1", "lr.warmup_epochs=0", "save.every=3st"]


JOB = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_NTASKS": "2", "SLURM_CPUS_PER_TASK": "1"}


@pytest.fixture
def start(tmp_path):
    """A function that starts a command in a job of two machines. A core for all: several to each rank slow
    the ranks down far more than twofold. What still runs after the test is ended."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    environment = environment_of_its_own() | install(tmp_path / "commands") | JOB
    begun = []

    def start(words: list[str]) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )
        begun.append(process)
        return process

    yield start
    os.sched_setaffinity(0, cores)
    for process in begun:
        if process.poll() is None:
            for each in [*psutil.Process(process.pid).children(recursive=True), process]:
                each.kill()
            process.communicate()


def script(which: str, arguments: list[str], **others: str) -> str:
    """One of the page's, with a tiny run in place of its recipe, and other texts replaced."""
    (text,) = [
        block
        for block in re.findall(r"```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
        if f"\n    {which}" in block or f"\n{which}" in block
    ]
    changes = {"imagenet/resnet50_90 data.root=/data/imagenet": shlex.join(arguments), **others}
    for old, new in changes.items():
        assert old in text, old
        text = text.replace(old, new)
    return text


def finished(runs: Path) -> Path:
    """The one run that there is, of two ranks and with its result."""
    (run,) = runs.glob("*/*")
    assert json.loads((run / "result.json").read_text())["sparse"]["num_images"] == 150
    return run


@pytest.mark.rare
def test_torchrun_on_two_machines(start, tiny_data, tmp_path):
    arguments = tiny(tiny_data, tmp_path / "runs", *SHORT)
    changes = {"--nproc-per-node=8": "--nproc-per-node=1", "node1": "127.0.0.1", "29500": str(free_port())}
    text = script("torchrun", arguments, **changes)
    second = start(["bash", "-c", text, "train.sh", "1"])
    first = start(["bash", "-c", text, "train.sh", "0"])
    output = first.communicate(timeout=120)[0]
    assert first.returncode == 0, output
    assert second.wait() == 0, second.communicate()[0]
    assert "device      2 x cpu" in output
    assert "device" not in second.communicate()[0]  # one voice
    finished(tmp_path / "runs")


@pytest.mark.rare
def test_a_job_of_srun_stops_before_its_time_and_goes_on_in_its_next_turn(start, tiny_data, tmp_path):
    name = f"resnet50-{JOB['SLURM_JOB_ID']}"
    words = ["bash", "-c", script("srun", tiny(tiny_data, tmp_path / "runs", *SHORT))]
    process = start(words)
    wait_for_step(process, tmp_path / "runs", 4)
    srun = next(each for each in psutil.Process(process.pid).children() if "srun" in " ".join(each.cmdline()))
    srun.send_signal(signal.SIGUSR1)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    assert "device      2 x cpu" in output
    assert "error: stopped at step " in output
    assert (tmp_path / "commands" / "asked").read_text() == f"requeue {JOB['SLURM_JOB_ID']}\n"
    (run,) = (tmp_path / "runs" / name).iterdir()
    assert not (run / "result.json").exists()
    again = start(words)
    output = again.communicate(timeout=120)[0]
    assert again.returncode == 0, output
    assert finished(tmp_path / "runs") == run


@pytest.mark.rare
def test_a_killed_rank_on_a_machine_of_the_host_file(start, tiny_data, tmp_path):
    (tmp_path / "hosts").write_text("127.0.0.1 slots=1\n127.0.0.2 slots=1\n")
    arguments = tiny(tiny_data, tmp_path / "runs", *SHORT)
    options = ["--hostfile", str(tmp_path / "hosts"), "--max-restarts", "1"]
    process = start(command("train", *arguments, *options))
    wait_for_step(process, tmp_path / "runs", 4)
    ranks = {
        each.environ()["RANK"]: each
        for each in psutil.Process(process.pid).children(recursive=True)
        if "trainer.train" in each.cmdline() and "--local_rank=0" in each.cmdline()
    }
    ranks["1"].send_signal(signal.SIGKILL)
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 0, output
    assert "error: a process was killed (SIGKILL)" in output
    assert "restart 1 of 1, from " in output
    assert "Traceback" not in output
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["quickstart"]
    finished(tmp_path / "runs")
