"""The regression check, on records with given figures."""

import json

import pytest

from benchmarks import compare
from trainer.errors import exit_code_of


def spread(median, low, high):
    return {"median": median, "min": low, "max": high}


def record(**figures):
    return {"environment": {"cpu": "x", "gpus": [], "cores": 2}, "options": {"steps": 3}, **figures}


BEFORE = record(
    peers={"resnet50": {"batch": 32, "bar": 1.15, "ours_over_peer": spread(1.5, 1.4, 1.6)}},
    throughput=[
        {"network": "resnet50", "phase": "dense", "images_per_second": 100.0, "step_p50": 0.5},
        {"network": "resnet50", "phase": "compressed", "images_per_second": 90.0, "step_p50": 0.5},
    ],
    seconds={"compress": spread(0.2, 0.18, 0.3)},
)


def verdicts(change):
    after = json.loads(json.dumps(BEFORE))
    change(after)
    return {name: verdict for name, _, _, verdict in compare.compare(BEFORE, after, 0.05)}


def test_the_same_figures_are_no_change():
    found = verdicts(lambda after: None)
    assert len(found) == 6
    assert set(found.values()) == {""}


def test_rates_are_better_high_and_times_low():
    def change(after):
        after["throughput"][0]["images_per_second"] = 80.0
        after["throughput"][1]["images_per_second"] = 93.0  # within the tolerance
        after["throughput"][0]["step_p50"] = 0.6
        after["throughput"][1]["step_p50"] = 0.4
        after["peers"]["resnet50"]["ours_over_peer"] = spread(1.2, 1.1, 1.3)
        after["seconds"]["compress"] = spread(0.25, 0.22, 0.31)  # worse, but the spreads touch

    assert verdicts(change) == {
        "peers/resnet50/ours_over_peer": "worse",
        "throughput/resnet50 dense/images_per_second": "worse",
        "throughput/resnet50 dense/step_p50": "worse",
        "throughput/resnet50 compressed/images_per_second": "",
        "throughput/resnet50 compressed/step_p50": "better",
        "seconds/compress": "",
    }


@pytest.mark.parametrize(("factor", "code"), [(1.0, 0), (0.5, 1)])
def test_the_exit_code_tells(tmp_path, monkeypatch, capsys, factor, code):
    after = json.loads(json.dumps(BEFORE))
    after["throughput"][0]["images_per_second"] *= factor
    for name, content in (("a", BEFORE), ("b", after)):
        (tmp_path / name).write_text(json.dumps(content))
    monkeypatch.setattr("sys.argv", ["compare", str(tmp_path / "a"), str(tmp_path / "b")])
    assert compare.main() == code
    assert f"{int(factor < 1)} of 6 figures are worse" in capsys.readouterr().out


@pytest.mark.parametrize("content", [None, "{", "[]", "{}"])
def test_what_is_no_record_is_said(tmp_path, monkeypatch, capsys, content):
    (tmp_path / "a").write_text(json.dumps(BEFORE))
    if content is not None:
        (tmp_path / "b").write_text(content)
    monkeypatch.setattr("sys.argv", ["compare", str(tmp_path / "a"), str(tmp_path / "b")])
    assert exit_code_of(compare.main) == 2
    assert str(tmp_path / "b") in capsys.readouterr().err
