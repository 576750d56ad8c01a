"""Records: spreads that say what they are, and the commit that they come from."""

import json
import re
import subprocess
import sys
from argparse import ArgumentParser

import pytest

from benchmarks.shared import record
from trainer.checkpoints.environment import RECORDS, revision

COMMIT = "6e5c088e2204dd23d38aba46a6e78c9ae8d16242"


def test_the_document_names_the_records_of_changed_trees():
    changed = {
        path.stem
        for path in record.RESULTS.glob("[!.]*.json")
        if not path.name.endswith(".dirty.json")
        and json.loads(path.read_text())["environment"]["revision"].endswith("+changes")
    }
    page = (record.RESULTS.parents[1] / "docs" / "benchmarks.md").read_text()
    told = page.partition("as their `revision` says: ")[2].partition(".\n")[0]
    assert set(re.findall(r"`(\w+)`", told)) == changed


@pytest.mark.parametrize("count", [2, 3, 20, 96])
def test_no_percentile_lies_beyond_the_greatest_value(count):
    values = [1.0] * (count - 1) + [10.0]
    assert record.percentile(values, 50) == record.spread(values)["median"]
    assert 1.0 <= record.percentile(values, 95) <= 10.0
    assert record.percentile(list(range(101)), 95) == 95


def test_a_published_record_comes_from_a_commit(tmp_path):
    published, elsewhere = record.RESULTS / "gpu" / "peers.json", tmp_path / "peers.json"
    for path in (published, elsewhere):
        assert record.place_of(path, COMMIT) == path
    for unknown in (f"{COMMIT}+changes", None):
        assert record.place_of(published, unknown) == record.RESULTS / "gpu" / "peers.dirty.json"
        assert record.place_of(elsewhere, unknown) == elsewhere
    assert "*.dirty.json" in (record.ROOT / ".gitignore").read_text().splitlines()


@pytest.mark.parametrize("changed", [True, False])
def test_a_record_from_a_changed_tree_is_said_to_be_one(tmp_path, monkeypatch, capsys, changed):
    now = f"{COMMIT}+changes" if changed else COMMIT
    monkeypatch.setattr(record, "REVISION", now)
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(record, "environment", lambda: {"revision": now})
    (tmp_path / "x.json").write_text("published")
    monkeypatch.setattr(sys, "argv", ["x"])
    options = record.parse(ArgumentParser(), "x")
    assert ("not a record to publish" in capsys.readouterr().err) == changed
    record.write_record(options.out, {"figure": 1})
    printed = capsys.readouterr().out
    assert ("NOT A RECORD TO PUBLISH: the tree has uncommitted changes" in printed) == changed
    written = json.loads((tmp_path / ("x.dirty.json" if changed else "x.json")).read_text())
    assert written == {"environment": {"revision": now}, "figure": 1}
    assert ((tmp_path / "x.json").read_text() == "published") == changed


def test_a_tree_that_changes_while_a_benchmark_runs_is_no_commit(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(record, "REVISION", COMMIT)
    monkeypatch.setattr(record, "environment", lambda: {"revision": "another"})
    record.write_record(tmp_path / "x.json", {})
    found = json.loads((tmp_path / "x.json").read_text())["environment"]["revision"]
    assert found == f"{COMMIT}+changes"
    assert "NOT A RECORD" in capsys.readouterr().out


def test_the_revision_of_a_checkout(tmp_path):
    def git(*arguments):
        settings = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        done = subprocess.run(
            ["git", *settings, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    results = tmp_path / RECORDS
    results.mkdir(parents=True)
    assert revision(tmp_path) is None
    git("init", "--quiet")
    for path in (results / "a.json", tmp_path / "code.py"):
        path.write_text("1")
    git("add", ".")
    git("commit", "--quiet", "-m", "x")
    head = git("rev-parse", "HEAD")
    assert revision(tmp_path) == head
    (results / "a.json").write_text("2")  # a benchmark's record, and a new one
    (results / "b.json").write_text("2")
    assert revision(tmp_path) == head
    (tmp_path / "code.py").write_text("2")
    assert revision(tmp_path) == f"{head}+changes"
    git("checkout", "--quiet", "code.py")
    (tmp_path / "new.py").write_text("2")
    assert revision(tmp_path) == f"{head}+changes"
    inside = tmp_path / "site-packages"
    inside.mkdir()
    assert revision(inside) is None  # an installed package is not the repository around it
