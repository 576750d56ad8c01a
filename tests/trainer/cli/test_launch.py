"""Real processes through the real launcher: commands as a user types them, ranks, signals, kills."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from tests.data.photographs import make_tree
from tests.trainer.runs import (
    NUM_STEPS,
    assert_equal_states,
    command,
    environment_of_its_own,
    execute,
    final_state,
    launcher,
    newest_run,
    run_here,
    tiny,
    tiny_images,
    wait_for_step,
)
from trainer.cli import launch
from trainer.errors import UserError

pytestmark = [pytest.mark.usefixtures("needs_runs"), pytest.mark.launch]


@pytest.fixture(scope="module")
def uninterrupted(tiny_data, tmp_path_factory) -> Path:
    return run_here(tiny_data, tmp_path_factory.mktemp("uninterrupted"), "save.every=7st")


@pytest.fixture(scope="module")
def two_ranks(tiny_data, tmp_path_factory) -> Path:
    """One launch for all ZeRO stages: what both ranks saw, in a folder of each stage."""
    out = tmp_path_factory.mktemp("two-ranks")
    module = "tests.trainer.distributed.rank_check"
    done = execute(launcher(str(out), *tiny(tiny_data, out), devices=2, module=module))
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_two_ranks(stage, two_ranks):
    """For ZeRO 0, 1 and 2: equal masks on both ranks, no leak, momentum reset, exact resume."""
    (folder,) = two_ranks.glob(f"stage{stage}/quickstart/*")
    assert json.loads((folder / "deepspeed.json").read_text())["zero_optimization"]["stage"] == stage
    first, second = (
        json.loads((two_ranks / f"stage{stage}" / f"rank{rank}.json").read_text()) for rank in range(2)
    )
    assert first["masks"] == second["masks"]
    assert len(first["masks"]) == 3
    for seen in (first, second):
        assert seen["leaks"] == seen["master_leaks"] == 0
        assert seen["looks"] == NUM_STEPS + 3 + 1
        assert seen["momentum_after_decompression"] == [0, 0]
        assert seen["num_kept"] == 1946


@pytest.mark.rare
def test_acdc_train_with_two_devices_and_all_options(tiny_data, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")  # the usual way to ask for the CPU
    options = ["finetune_dense=true", "engine.zero_stage=1", "save.mask_history=true"]
    options += ["sparsity.recompute_batch_norm=4st", "log.weight_histograms=true"]
    done = execute(command("train", *tiny(tiny_data, tmp_path, *options), "--devices", "2"))
    assert done.returncode == 0, done.stderr
    assert "2 x cpu" in done.stdout
    assert done.stdout.count("test: loss") == 6 + 1  # one voice; the last one is the dense branch's
    assert "dense, finetuned" in done.stdout
    run = newest_run(tmp_path)
    result = json.loads((run / "result.json").read_text())
    assert result["finetuned_dense"]["epoch"] == 5
    assert result["finetuned_dense"]["num_images"] == 150
    assert len(list((run / "masks").iterdir())) == 3


@pytest.mark.rare
def test_one_of_two_ranks_meets_a_bad_file(tmp_path):
    root = make_tree(tmp_path / "tree", 2, 16, 4, around=40)
    bad = sorted((root / "train").glob("*/*.JPEG"))[5]
    bad.write_bytes(b"no image")
    short = ["epochs=2", "sparsity.schedule=dense 1, sparse 1"]
    arguments = tiny_images(root, tmp_path / "runs", *short)
    done = execute(launcher(*arguments, devices=2))
    assert done.returncode != 0
    assert f"{bad.relative_to(root)} cannot be decoded" in done.stderr
    assert "a checkpoint is saved at step" in done.stderr
    assert "Traceback" not in done.stderr
    (run,) = (tmp_path / "runs" / "mobilenetv1_90").iterdir()
    done = execute(launcher(*arguments, f"resume={run}", "data.on_error=skip", devices=2))
    assert done.returncode == 0, done.stderr
    assert json.loads((run / "result.json").read_text())["sparse"]["num_images"] == 8


@pytest.mark.slow
def test_mistakes_keep_their_exit_code_through_the_launcher(tiny_data, tmp_path):
    done = execute(launcher(*tiny(tiny_data, tmp_path, "optimizer.lrr=1"), devices=2))
    assert done.returncode == 2
    assert done.stderr.count("optimizer.lrr: unknown key; did you mean optimizer.lr?") == 1
    assert "Traceback" not in done.stderr + done.stdout


@pytest.mark.rare
def test_a_failure_of_the_first_rank_alone_is_told_once(tiny_data, tmp_path):
    done = execute(command("train", *tiny(tiny_data, tmp_path, "run_root=/dev/null/runs"), "--devices", "2"))
    assert done.returncode == 2
    assert done.stderr.count("run_root /dev/null/runs: the run folder cannot be written") == 1
    assert "Traceback" not in done.stderr + done.stdout


def start_and_wait(arguments: list[str], run_root: Path, step: int) -> subprocess.Popen[str]:
    """Start a run and return once its metrics have come to `step`."""
    process = subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment_of_its_own(),
    )
    wait_for_step(process, run_root, step)
    return process


@pytest.mark.slow
def test_killed_at_any_moment_the_run_goes_on_where_it_was(uninterrupted, tiny_data, tmp_path):
    arguments = tiny(tiny_data, tmp_path, "save.every=7st")
    options = ["--devices", "1", "--max-restarts", "1"]
    process = start_and_wait(command("train", *arguments, *options), tmp_path, 24)
    for child in reversed(psutil.Process(process.pid).children(recursive=True)):
        child.send_signal(signal.SIGKILL)
    run = newest_run(tmp_path)
    assert not (run / "result.json").exists()
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert f"restart 1 of 1, from {run}/checkpoints/step-00000002" in output
    assert newest_run(tmp_path) == run
    assert_equal_states(final_state(run), final_state(uninterrupted))
    assert not list(tmp_path.glob(".started*"))


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.rare)], ids=["TERM", "USR1"]
)
def test_a_signal_saves_and_stops(uninterrupted, tiny_data, tmp_path, number):
    arguments = tiny(tiny_data, tmp_path, "save.every=7st")
    process = start_and_wait(command("train", *arguments, "--devices", "1"), tmp_path, 4)
    process.send_signal(number)
    if number != signal.SIGTERM:
        time.sleep(0.3)  # Python handles signals that are pending together by number
        process.send_signal(signal.SIGHUP)  # a second signal of this kind is no impatience
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "error: stopped at step " in output
    assert f"Go on with resume={newest_run(tmp_path)}" in output
    assert "Traceback" not in output
    resumed = run_here(tiny_data, tmp_path, "save.every=7st", "resume=auto")
    assert_equal_states(final_state(resumed), final_state(uninterrupted))
    assert not [
        p for p in psutil.process_iter() if str(tmp_path) in " ".join(_cmdline(p)) and p.pid != os.getpid()
    ]


@pytest.mark.slow
def test_a_process_without_our_launcher_saves_and_stops_too(tiny_data, tmp_path):
    arguments = [sys.executable, "-m", "trainer.train", *tiny(tiny_data, tmp_path)]
    process = start_and_wait(arguments, tmp_path, 4)
    process.send_signal(signal.SIGHUP)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGHUP
    assert "error: stopped at step " in output


@pytest.mark.slow
def test_a_reader_that_goes_does_not_end_the_run(tiny_data, tmp_path):
    """As with `acdc train ... 2>&1 | head -1`."""
    short = ["epochs=2", "sparsity.schedule=dense 1, sparse 1", "lr.warmup_epochs=0"]
    arguments = command("train", *tiny(tiny_data, tmp_path, *short), "--devices", "1")
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=120) == 0
    assert (newest_run(tmp_path) / "result.json").exists()
    assert (newest_run(tmp_path) / "report.html").exists()


@pytest.mark.rare
def test_a_killed_launcher_is_no_success(tiny_data, tmp_path):
    """DeepSpeed's runner reports success then, and leaves the rank running."""
    process = start_and_wait(command("train", *tiny(tiny_data, tmp_path), "--devices", "1"), tmp_path, 4)
    children = psutil.Process(process.pid).children(recursive=True)
    (node,) = [child for child in children if "deepspeed.launcher.launch" in child.cmdline()]
    node.send_signal(signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 5
    assert "error: the launcher was killed" in output
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)


def test_a_process_that_nobody_reaped_is_not_alive():
    process = subprocess.Popen([sys.executable, "-c", ""], start_new_session=True)
    deadline = time.monotonic() + 20
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not launch._alive(process.pid)
    process.wait()
    living = subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True
    )
    assert launch._alive(living.pid)
    living.communicate(b"\n")


@pytest.mark.parametrize(
    ("visible", "devices", "options", "left"),
    [
        (None, None, ["--num_gpus", "4"], None),
        (None, 2, ["--num_gpus", "2"], None),
        ("2,3", None, ["--include", "localhost:2,3"], None),
        ("2,3,5,6", 2, ["--include", "localhost:2,3"], None),
        ("GPU-1,GPU-2,GPU-3,GPU-4", None, ["--num_gpus", "4"], "GPU-1,GPU-2,GPU-3,GPU-4"),
    ],
)
def test_devices_are_the_visible_ones(visible, devices, options, left, monkeypatch):
    """The launcher's options on a GPU machine; a machine without one can check no more."""
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(visible.split(",")) if visible else 4)
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert launch._placement(launch.count_devices(devices), environment) == options
    assert environment.get("CUDA_VISIBLE_DEVICES") == left
    with pytest.raises(UserError, match=r"--devices 9: this machine shows \d GPUs"):
        launch.count_devices(9)


def test_devices_of_a_cpu_are_its_cores_at_most(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert [launch.count_devices(wanted) for wanted in (None, 2, 4)] == [1, 2, 4]
    with pytest.raises(UserError, match="--devices 5: this machine shows 4 cores"):
        launch.count_devices(5)


def _cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
