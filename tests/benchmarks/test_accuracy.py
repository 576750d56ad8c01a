"""The runs behind docs/evidence.md: which they are, that one is trained once, and their figures."""

import json
import sys

import numpy as np
import pytest

from benchmarks.accuracy import __main__ as accuracy
from benchmarks.accuracy import figures, runs, tables
from benchmarks.accuracy.images import root_of
from benchmarks.shared.record import RESULTS
from data.datasets import fashion_mnist
from trainer.errors import UserError

ROWS = {row.name: row for row in tables.TABLES["main"]}


def record(row: tables.Row, top1: float, sparse: bool = True, seconds: float = 36.0) -> dict:
    dense = {"top1": top1 + 0.5, "sparsity": 0.0}
    result = {
        "dense_twin": dense if sparse else {"top1": top1, "sparsity": 0.0},
        "sparse": {"top1": top1, "sparsity": 0.9} if sparse else None,
        "flops": {"training_ratio": 0.6 if sparse else 1.0, "training": 6e14},
        "seconds": seconds,
    }
    config = row.config().model_dump(mode="json")
    return {"config": config, "result": result, "curve": [["dense", 1.0, 1.0, top1, 10.0, 80.0]] * 2}


@pytest.fixture
def results(tmp_path):
    """Records of three dense seeds and two of AC/DC."""
    for name, tops in (("dense", (91.0, 91.2, 91.4)), ("acdc_90", (90.8, 90.8))):
        for seed, top1 in enumerate(tops, 1):
            path = tmp_path / "main" / f"{name}_{seed}.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(record(ROWS[name], top1, name != "dense")))
    return tmp_path


@pytest.mark.parametrize("table", tables.TABLES)
def test_every_row_loads_and_goes_on_from_one_before_it(table):
    names = []
    for row in tables.TABLES[table]:
        assert row.config().engine.precision == ("bf16" if row.name.startswith("bf16") else "fp32")
        assert row.after is None or row.after in names
        names.append(row.name)
    assert len(set(names)) == len(names)


def test_methods_of_the_main_table_train_over_as_many_epochs():
    rows = {row.name: row for row in tables.TABLES["main"]}
    for row in rows.values():
        before = rows[row.after].config().epochs if row.after else 0
        assert row.config().epochs + before == (12 if row.name == "dense_12" else 20), row
        if "90" in row.name or "95" in row.name:
            assert row.config().sparsity.target == float(row.name[-2:]) / 100
            assert row.seeds == 5


def test_runs_go_seed_by_seed_and_tuning_has_seeds_of_its_own():
    seeds = [run.seed for run in runs.runs_of("main")]
    assert seeds == sorted(seeds)
    assert set(seeds) == {1, 2, 3, 4, 5}
    assert not {run.seed for run in runs.runs_of("tuning")} & set(seeds)


def test_a_row_of_a_recipe_of_the_main_table_has_its_runs(results):
    shared = [row for table in ("compute", "ablations") for row in tables.TABLES[table] if row.same_as]
    assert [row.same_as for row in shared] == ["dense", "acdc_90", "acdc_90"]
    for row in shared:
        assert row.config() == ROWS[row.same_as].config()
        assert row.seeds <= ROWS[row.same_as].seeds
    found = {each.row.name: each.final() for each in figures.read("compute", results)}
    assert found["dense_20_epochs"] == {1: 91.0, 2: 91.2, 3: 91.4}
    assert found["dense_30_epochs"] == {}


def test_the_lines_of_a_table(results):
    dense, acdc = figures.lines("main", figures.read("main", results))
    assert dense == ("dense", "3", "", "91.20 ± 0.20", "", "", "", "1.00", "0.01")
    # Paired by seed: 90.8 - 91.0 and 90.8 - 91.2
    assert acdc[:6] == ("AC/DC 90 %", "2", "90.0 %", "90.80 ± 0.00", "-0.30 ± 0.10", "91.30 ± 0.00")
    head, rule, first, _ = figures.markdown([dense, acdc])
    assert head.count("|") == rule.count("|") == first.count("|")
    assert "fine-tuned" not in head  # nothing is


def test_a_row_costs_what_it_starts_from_as_well():
    rows = {row.name: row for row in tables.TABLES["main"]}
    before = figures.Found(
        rows["dense_12"], {1: record(rows["dense_12"], 90.0, sparse=False, seconds=7200.0)}
    )
    # as many FLOPs as the 12 dense epochs, 0.6 of its own dense epochs' 10^15
    after = figures.Found(
        rows["one_shot_90"], {seed: record(rows["one_shot_90"], 90.0, seconds=3600.0) for seed in (1, 2)}
    )
    _, line = figures.lines("main", [before, after])
    assert line[-2:] == (f"{2 * 6e14 / (6e14 + 1e15):.2f}", "3.00")  # of seed 1 alone


@pytest.mark.parametrize("table", ["main", "memorisation", "compute"])
def test_pictures_are_drawn_of_what_there_is(table, tmp_path):
    for run in list(runs.runs_of(table))[:4]:
        row, path = run.row, run.record(tmp_path)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(record(row, 90.0)))
    figures.draw(table, figures.read(table, tmp_path), tmp_path / "picture.svg")
    assert "<svg" in (tmp_path / "picture.svg").read_text()


def test_the_plan_counts_what_is_left(results, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["accuracy", "--plan", "--rows", "dense", "--out", str(results)])
    assert accuracy.main() == 0
    said = capsys.readouterr().out
    assert "3 of 5" in said
    assert "2 of 5 runs are left, 40 epochs: about 0.2 hours" in said  # 18 seconds an epoch


def test_a_record_of_another_recipe_is_left_to_train(results, monkeypatch, capsys):
    path = results / "main" / "dense_2.json"
    content = json.loads(path.read_text())
    content["config"]["optimizer"]["lr"] = 0.3
    path.write_text(json.dumps(content))
    monkeypatch.setattr(sys, "argv", ["accuracy", "--plan", "--rows", "dense", "--out", str(results)])
    assert accuracy.main() == 0
    assert "3 of 5 runs are left" in capsys.readouterr().out
    assert figures.lines("main", figures.read("main", results))[0][3] == "91.20 ± 0.28"


def test_a_run_that_was_stopped_before_its_dense_branch_goes_on(tmp_path):
    run = runs.Run("main", ROWS["acdc_90"], 3)
    folder = tmp_path / "main" / "acdc_90_3" / "acdc" / "now"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(json.dumps(run.row.config().model_dump(mode="json")))
    result = json.loads((RESULTS / "accuracy" / "main" / "acdc_90_1.json").read_text())["result"]
    (folder / "result.json").write_text(json.dumps(result))
    assert runs.finished(run, tmp_path).path == folder
    del result["finetuned_dense"]
    (folder / "result.json").write_text(json.dumps(result))
    assert runs.finished(run, tmp_path) is None


def test_a_row_that_there_is_not_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["accuracy", "--rows", "adam"])
    with pytest.raises(SystemExit):
        accuracy.main()
    assert "no row adam in main; see --plan" in capsys.readouterr().err


def test_parts_of_the_images(monkeypatch, tmp_path):
    monkeypatch.setenv("ACDC_DATA", str(tmp_path))
    with pytest.raises(UserError, match="acdc prepare fashion-mnist"):
        root_of("all")
    assert len(fashion_mnist.load(root_of("bundled"), "train")) == 12_000
    with np.load(fashion_mnist.BUNDLED) as bundled:
        fashion_mnist.write_archive(tmp_path / "fashion-mnist" / fashion_mnist.ARCHIVE, dict(bundled))
    whole = fashion_mnist.load(root_of("all"), "train")
    train, test = (fashion_mnist.load(root_of("held_out"), split) for split in ("train", "test"))
    assert (len(train), len(test)) == (2_000, 10_000)
    assert np.array_equal(np.concatenate([train.images, test.images]), whole.images)
    first = fashion_mnist.load(root_of("first_10000"), "train")
    assert np.array_equal(first.images, whole.images[:10_000])
    assert len(fashion_mnist.load(root_of("first_10000"), "test")) == 2_000


@pytest.mark.rare
def test_a_run_is_trained_once_and_goes_on_from_another_ones_network(monkeypatch, tmp_path):
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    tiny = ("steps_per_epoch=2", "engine.compile=false", "model.arguments.width=8", "sparsity.accelerate=off")
    short = ("epochs=2", "sparsity.schedule=dense 2")
    rows = (
        tables.Row("dense_12", "dense", "dense", (*short, *tiny), 1),
        tables.Row(
            "one_shot_90", "one-shot", "one_shot", (*tiny, "epochs=2", "sparsity.schedule=sparse 2"), 1,
            after="dense_12",
        ),
    )  # fmt: skip
    monkeypatch.setitem(tables.TABLES, "main", rows)
    folder = tmp_path / "full"
    with np.load(fashion_mnist.BUNDLED) as bundled:
        fashion_mnist.write_archive(folder / fashion_mnist.ARCHIVE, dict(bundled))
    monkeypatch.setattr(runs, "root_of", lambda images: folder)
    arguments = ["accuracy", "--run-root", str(tmp_path / "runs"), "--out", str(tmp_path / "records")]
    monkeypatch.setattr(sys, "argv", arguments)
    assert accuracy.main() == 0
    made = json.loads((tmp_path / "records" / "main" / "one_shot_90_1.json").read_text())
    assert made["result"]["sparse"]["sparsity"] == pytest.approx(0.9, abs=0.01)
    assert len(made["curve"]) == 2
    assert len(made["trained_on"]) == 1
    begun = sorted((tmp_path / "runs").rglob("history.jsonl"))
    assert len(begun) == 2  # the dense one once, for its own record and for the other
    (tmp_path / "records" / "main" / "dense_12_1.json").unlink()
    assert accuracy.main() == 0  # the record again, from the run that is there
    assert sorted((tmp_path / "runs").rglob("history.jsonl")) == begun
