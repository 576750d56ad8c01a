"""The small files of a run folder never stop a run from going on, and `resume=auto` finds the right one."""

import json
import logging
import os
import random
import shutil

import pytest

from tests.trainer.runs import run_here, tiny
from trainer.checkpoints import checkpoint
from trainer.checkpoints.run_dir import RunDir, find_resumed
from trainer.config.load import load_config
from trainer.monitor.records import Monitor
from trainer.monitor.screen import Screen
from trainer.report.run import write_report

SHORT = ("epochs=2", "sparsity.schedule=dense 1, sparse 1", "lr.warmup_epochs=0", "log.every=4st")


@pytest.fixture(scope="module")
def whole(tiny_data, tmp_path_factory):
    return run_here(tiny_data, tmp_path_factory.mktemp("runs"), *SHORT)


@pytest.fixture
def run(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "quickstart" / whole.name)


def flipped(content, generator):
    content = bytearray(content)
    content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    return bytes(content)


def resumed(tiny_data, tmp_path, *overrides):
    return find_resumed(
        load_config("quickstart", tiny(tiny_data, tmp_path, *SHORT, "resume=auto", *overrides)[1:])
    )


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b"\xff\xfe", b'{"dense_twin": {}, "sparse": null}']
)
def test_a_result_that_cannot_be_read_is_set_aside(run, content, tiny_data, tmp_path, caplog):
    assert resumed(tiny_data, tmp_path) is None  # it is finished
    (run / "result.json").write_bytes(content)
    with caplog.at_level(logging.WARNING):
        found, state = resumed(tiny_data, tmp_path)
    assert (found.path, state) == (run, checkpoint.newest_whole(run / "checkpoints"))
    assert "result.json cannot be read; it is set aside" in caplog.text
    assert (run / "result.json.damaged").read_bytes() == content
    assert not (run / "result.json").exists()


def test_any_flipped_bit_in_the_result_leaves_a_report(run):
    generator, path = random.Random(0), run / "result.json"
    content = path.read_bytes()
    for _ in range(8):
        path.write_bytes(flipped(content, generator))
        (run / "report.html").unlink()
        write_report(RunDir(run))
        assert (run / "report.html").read_text().count("<figure") > 3


def test_any_flipped_bit_in_the_metrics_leaves_the_other_records(run):
    generator, folder = random.Random(0), RunDir(run)
    content = folder.metrics.read_bytes()
    records = folder.read_metrics()
    for _ in range(150):
        folder.metrics.write_bytes(flipped(content, generator))
        found = folder.read_metrics()
        assert len(found) >= len(records) - 2  # a line feed lost joins two
        assert all(record["step"] >= 0 for record in found)


@pytest.mark.parametrize("line", ["{}", "[]", "null", '{"kind": "epoch"}', '{"kind": []}', "[" * 100_000])
def test_lines_that_are_no_records_are_left_out_and_kept_beside(run, line, caplog):
    folder = RunDir(run)
    records = folder.read_metrics()
    assert not (run / "metrics.jsonl.damaged").exists()
    with folder.metrics.open("a") as file:
        file.write(f"{line}\n")
    before = folder.metrics.read_bytes()
    with caplog.at_level(logging.WARNING):
        monitor = Monitor(folder, Screen(0, 0, 0), records[-1]["step"])
    monitor.close()
    assert "metrics.jsonl cannot be read and are left out; metrics.jsonl.damaged keeps them" in caplog.text
    assert (run / "metrics.jsonl.damaged").read_bytes() == before
    assert folder.read_metrics() == records
    write_report(folder)


def test_a_line_cut_short_by_a_crash_is_nothing_to_warn_of(run, caplog):
    folder = RunDir(run)
    records = folder.read_metrics()
    with folder.metrics.open("a") as file:
        file.write(json.dumps(records[-1])[:40])
    assert folder.read_metrics() == records
    assert not caplog.text


def test_the_run_trained_last_goes_on_whatever_its_name_says(run, tiny_data, tmp_path):
    (run / "result.json").unlink()
    future = shutil.copytree(run, run.with_name("20991231-000000"))
    for state in future.glob("checkpoints/step-*"):
        os.utime(state, (10**9, 10**9))
    assert resumed(tiny_data, tmp_path)[0].path == run


def test_a_run_without_a_whole_state_gives_way_to_an_older_one(run, tiny_data, tmp_path):
    (run / "result.json").unlink()
    newer = shutil.copytree(run, run.with_name("20991231-000000"))
    for state in newer.glob("checkpoints/step-*/state.pt"):
        state.write_bytes(b"damaged")
    assert resumed(tiny_data, tmp_path)[0].path == run
    shutil.rmtree(run)
    assert resumed(tiny_data, tmp_path) is None
