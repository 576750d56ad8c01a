"""The table of exit codes in docs/machines.md, and how a run comes to those that need more than a typing
error or a signal: tests/trainer/cli has these, tests/trainer/test_run.py has divergence."""

import errno
import re
import signal
import sys
from pathlib import Path

import pytest
import torch

from sparsity import MaskError
from tests.trainer.runs import newest_run, tiny
from trainer import train
from trainer.checkpoints import checkpoint
from trainer.checkpoints.run_dir import create
from trainer.cli import launch
from trainer.cli.restarts import Restarts
from trainer.config.load import load_config
from trainer.distributed import ranks
from trainer.distributed.signals import SIGNALS
from trainer.errors import EnvironmentFailure, Failure, as_user_error, exit_code_of

PAGE = Path(__file__).parents[2] / "docs" / "machines.md"
SHORT = ["epochs=2", "sparsity.schedule=dense 1, sparse 1", "lr.warmup_epochs=0", "steps_per_epoch=1"]


def test_the_table_has_every_code():
    text = PAGE.read_text(encoding="utf-8").partition("## Exit codes")[2]
    rows = re.findall(r"^\| ([\d, ]+) \|", text, re.MULTILINE)
    codes = [int(code) for row in rows for code in row.split(",")]
    ours = {kind.exit_code for kind in Failure.__subclasses__()} | {Failure.exit_code}
    assert sorted(codes) == sorted(ours | {128 + number for number in SIGNALS})


EVALUATE, BUILD = "trainer.loop.evaluate", "trainer.build.build_engine"
NO_MEMORY = RuntimeError("DefaultCPUAllocator: can't allocate memory")
LOST = RuntimeError("Connection closed by peer [::1]")
LEAK = MaskError("dropped weights are back", ["conv1"])


@pytest.mark.parametrize(
    ("place", "error", "code", "said"),
    [
        (EVALUATE, torch.OutOfMemoryError("CUDA out of memory."), 3, "out of memory: more "),
        (BUILD, NO_MEMORY, 3, "out of memory: more "),
        (BUILD, MemoryError(), 3, "out of memory: more "),
        (EVALUATE, LEAK, 2, "sparsity: dropped weights"),
        (EVALUATE, LOST, 5, "another process of this"),
    ],
)
def test_failures_of_a_run(place, error, code, said, tiny_data, tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        monkeypatch.setenv("WORLD_SIZE", "2")  # where it fails a second rank could be lost
        raise error

    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr(place, fail)
    monkeypatch.setattr(train.time, "sleep", lambda _: None)
    assert train.main(tiny(tiny_data, tmp_path, *SHORT)) == code
    message = capsys.readouterr().err
    assert "Traceback" not in message
    assert f"error: {said}" in message
    if place == EVALUATE and error is not LEAK:
        assert f"go on with resume={newest_run(tmp_path)}" in message


def test_ranks_that_cannot_meet(tiny_data, tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise torch.distributed.DistNetworkError("EADDRINUSE: address already in use\nand a trace of C++")

    for key, value in {"RANK": "0", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    monkeypatch.setattr(ranks.import_deepspeed(), "init_distributed", fail)
    assert train.main(tiny(tiny_data, tmp_path)) == 3
    message = capsys.readouterr().err
    assert "cannot meet at node1, port 29500: EADDRINUSE: address already in use\n" in message
    assert "C++" not in message


def test_what_nobody_foresaw_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="odd"):
        exit_code_of(lambda: (_ for _ in ()).throw(RuntimeError("odd")))


def test_too_little_memory_and_a_full_disk_are_no_mistakes_of_the_users(tmp_path, monkeypatch):
    with pytest.raises(EnvironmentFailure, match="out of memory"), as_user_error("data"):
        raise OSError(12, "Cannot allocate memory")

    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", refuse)
    for path in (None, tmp_path / "run"):
        with pytest.raises(EnvironmentFailure, match=r"cannot be written: .*No space left"):
            create(load_config("quickstart"), path)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (256 - 9, "a process was killed (SIGKILL), as the system does where memory is short"),
        (-9, "a process was killed (SIGKILL), as the system does where memory is short"),
        (256 - 11, "a process was ended by SIGSEGV"),
        (255, "a process, or the connection to a machine, was lost (SIGHUP)"),
        *((code, None) for code in (0, 1, 2, 3, 4, 5, 130, 138, 143)),
    ],
)
def test_what_the_launchers_code_says_of_a_death(code, reason):
    assert launch._reason_of_death(code) == reason


@pytest.mark.parametrize("received", [[], [signal.SIGINT]])
def test_a_killed_launcher(received, monkeypatch, capfd):
    """After an impatient Ctrl-C it is no news."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    command = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"]
    code = launch._run(command, {}, received)
    said = "error: a process was killed (SIGKILL)" in capfd.readouterr().err
    assert (code == 5, said) == (not received, not received)


@pytest.fixture
def codes(monkeypatch):
    """A function that lets starts end with these exit codes; what each was started with."""

    def end_with(restarts: Restarts, *codes: int, then=lambda: None) -> tuple[int, list[list[str]]]:
        started, left = [], list(codes)

        def run(command: list[str], *_) -> int:
            started.append(command)
            then()
            return left.pop(0)

        monkeypatch.setattr(launch, "_run", run)
        monkeypatch.setattr(launch.Launcher, "command", lambda _, arguments: arguments)
        code = launch.launch(launch.Launcher([], {}), restarts)
        assert not left
        return code, started

    return end_with


def test_a_run_whose_processes_die_starts_again_so_many_times(codes, tmp_path, capsys):
    code, started = codes(Restarts("quickstart", ["epochs=14"], tmp_path, 2), 5, 1, 5)
    assert code == 5
    assert [words[:3] for words in started] == [["trainer.train", "quickstart", "epochs=14"]] * 3
    assert "restart 2 of 2, from its beginning: no checkpoint was saved" in capsys.readouterr().err


@pytest.mark.parametrize("code", [0, 2, 3, 4, 138, 143])
def test_what_is_done_or_to_be_mended_does_not_start_again(codes, tmp_path, code):
    assert codes(Restarts("quickstart", [], tmp_path, 3), code)[0] == code


def test_without_the_option_nothing_starts_again(codes, tmp_path):
    assert codes(Restarts("quickstart", ["epochs=14"], tmp_path, 0), 5) == (
        5,
        [["trainer.train", "quickstart", "epochs=14"]],
    )


def test_it_goes_on_from_the_newest_whole_checkpoint_of_this_very_run(codes, tmp_path, capsys):
    """Which the run has written down; another run of the name may be newer."""
    run = tmp_path / "quickstart" / "one"
    run.mkdir(parents=True)
    for step, whole in ((7, True), (14, False)):
        point = checkpoint.step_folder(run / "checkpoints", step)
        checkpoint.save(point, {checkpoint.STATE: {"a": torch.ones(2)}}, {"step": step})
        if not whole:
            (point / checkpoint.STATE).write_bytes(b"damaged")
    restarts = Restarts("quickstart", ["resume=auto", "epochs=14"], tmp_path, 1)
    code, started = codes(restarts, 5, 0, then=lambda: restarts.file.write_text(str(run)))
    assert code == 0
    assert [words[2:-1] for words in started] == [
        ["resume=auto", "epochs=14"],
        ["epochs=14", f"resume={run}"],
    ]
    assert f"restart 1 of 1, from {checkpoint.step_folder(run / 'checkpoints', 7)}" in capsys.readouterr().err
    assert not restarts.file.exists()
