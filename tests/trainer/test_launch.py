"""Real processes through the real launcher: commands as a user types them, ranks, signals, kills."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.trainer.runs import (
    NUM_STEPS,
    assert_equal_states,
    command,
    execute,
    final_state,
    launcher,
    newest_run,
    run_here,
    tiny,
)

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
pytest.importorskip("nvidia.dali", reason="DALI is not installed")
pytestmark = pytest.mark.launch


@pytest.fixture(scope="module")
def uninterrupted(tiny_data, tmp_path_factory) -> Path:
    return run_here(tiny_data, tmp_path_factory.mktemp("uninterrupted"), "checkpoint.every=7st")


def test_the_launchers_command_compiles_two_graphs_over_all_phases(tiny_data, tmp_path):
    """Three compressions and two decompressions: a graph for training, one for evaluation, no more."""
    done = execute(launcher(*tiny(tiny_data, tmp_path, "engine.compile=true")))
    assert done.returncode == 0, done.stderr
    run = newest_run(tmp_path)
    assert json.loads((run / "result.json").read_text())["compile"] == {"graphs": 2, "recompilations": 0}
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["graphs"] for record in records if record["kind"] == "epoch"] == [2] * 6
    lines = done.stdout.splitlines()
    assert sum(line.startswith("epoch ") and "test: loss" in line for line in lines) == 6
    for word in (
        "run folder",
        "phases",
        "dense twin",
        "sparse model",
        "2 graphs, 0 more after the first epoch",
    ):
        assert word in done.stdout, word
    assert "\x1b" not in done.stdout


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_two_ranks(stage, tiny_data, tmp_path):
    """For ZeRO 0, 1 and 2: equal masks on both ranks, no leak, momentum reset, exact resume."""
    arguments = tiny(tiny_data, tmp_path / "runs", f"engine.zero_stage={stage}")
    done = execute(launcher(str(tmp_path), *arguments, devices=2, module="tests.trainer.rank_check"))
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert first["masks"] == second["masks"]
    assert len(first["masks"]) == 3
    for seen in (first, second):
        assert seen["leaks"] == seen["master_leaks"] == 0
        assert seen["looks"] == NUM_STEPS + 3 + 1
        assert seen["momentum_after_decompression"] == [0, 0]
        assert seen["num_kept"] == 496


def test_acdc_train_with_two_devices(tiny_data, tmp_path):
    done = execute(command("train", *tiny(tiny_data, tmp_path), "--devices", "2"))
    assert done.returncode == 0, done.stderr
    assert "2 x cpu" in done.stdout
    assert done.stdout.count("test: loss") == 6  # one voice


def test_mistakes_keep_their_exit_code_through_the_launcher(tiny_data, tmp_path):
    done = execute(launcher(*tiny(tiny_data, tmp_path, "optimizer.lrr=1"), devices=2))
    assert done.returncode == 2
    assert done.stderr.count("optimizer.lrr: unknown key; did you mean optimizer.lr?") == 1
    assert "Traceback" not in done.stderr + done.stdout
    done = execute(
        command("train", *tiny(tiny_data, tmp_path, "sparsity.include=[nothing]"), "--devices", "1")
    )
    assert done.returncode == 2
    assert "include pattern 'nothing' matches no convolution" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout


def start_and_wait(arguments: list[str], run_root: Path, step: int) -> subprocess.Popen[str]:
    """Start a run and return once its metrics have come to `step`."""
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        files = list(run_root.glob("quickstart/*/metrics.jsonl"))
        if files and (lines := files[0].read_text().splitlines()) and json.loads(lines[-1])["step"] >= step:
            return process
        time.sleep(0.02)
    process.kill()
    raise AssertionError(f"the run did not come to step {step}: {process.communicate()[0]}")


def test_killed_at_any_moment_the_run_goes_on_where_it_was(uninterrupted, tiny_data, tmp_path):
    arguments = tiny(tiny_data, tmp_path, "checkpoint.every=7st")
    process = start_and_wait(command("train", *arguments, "--devices", "1"), tmp_path, 24)
    for child in reversed(psutil.Process(process.pid).children(recursive=True)):
        child.send_signal(signal.SIGKILL)
    assert process.wait(timeout=60) != 0
    process.stdout.close()
    run = newest_run(tmp_path)
    assert not (run / "result.json").exists()
    assert_equal_states(
        final_state(run_here(tiny_data, tmp_path, "checkpoint.every=7st", "resume=auto")),
        final_state(uninterrupted),
    )
    assert newest_run(tmp_path) == run


def test_a_signal_saves_and_stops(uninterrupted, tiny_data, tmp_path):
    arguments = tiny(tiny_data, tmp_path, "checkpoint.every=7st")
    process = start_and_wait(command("train", *arguments, "--devices", "1"), tmp_path, 4)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "error: stopped at step " in output
    assert f"Go on with resume={newest_run(tmp_path)}" in output
    assert "Traceback" not in output
    resumed = run_here(tiny_data, tmp_path, "checkpoint.every=7st", "resume=auto")
    assert_equal_states(final_state(resumed), final_state(uninterrupted))
    assert not [
        p for p in psutil.process_iter() if str(tmp_path) in " ".join(_cmdline(p)) and p.pid != os.getpid()
    ]


def _cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
