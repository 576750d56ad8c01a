"""Report pages: what they show, in which places, of whole, old, unfinished and hostile records."""

import json
import re
import shutil
import time
from html.parser import HTMLParser

import pytest

from trainer.checkpoints.run_dir import RunDir
from trainer.cli.main import main
from trainer.report.charts import Series, chart, number, phases
from trainer.report.compare import write_comparison
from trainer.report.run import write_report

KINDS = ["dense", "dense", "sparse", "dense", "sparse"]


def epoch(i, kind, layers=("conv1", "fc"), **more):
    share = 0.9 * (kind == "sparse")
    return {
        "kind": "epoch",
        "epoch": i,
        "step": 10 * i + 10,
        "phase": kind,
        "lr": 0.1 / (i + 1),
        "train_loss": 1.5,
        "val_loss": 1.25,
        "val_top1": 50.0 + i,
        "val_top5": 90.0,
        "sparsity": share,
        "mask_difference": 0.02 if i == 4 else None,
        "images_per_second": 1000.0 + i,
        "data_wait": 0.01,
        "seconds": 60.0 * (i + 1),
        "training_flops": 1e9 * (i + 1 - 0.75 * KINDS[: i + 1].count("sparse")),
        "dense_training_flops": 1e9 * (i + 1),
        "layer_sparsity": dict.fromkeys(layers, share),
        **more,
    }


def row(i, top1, sparsity):
    return {"epoch": i, "top1": top1, "top5": 90.0, "loss": 1.0, "sparsity": sparsity, "num_images": 2000}


@pytest.fixture
def make(tmp_path):
    def make(name="now", records=None, finished=True, **recipe):
        folder = tmp_path / "shop" / name
        folder.mkdir(parents=True)
        records = records or [epoch(i, kind) for i, kind in enumerate(KINDS)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
        result = {
            "name": name,
            "schedule": "dense 2, sparse 1, dense 1, sparse 1",
            "dense_twin": row(3, 53.25, 0.0),
            "sparse": row(4, 54.5, 0.9),
            "flops": {"training_ratio": 0.665, "inference_ratio": 0.222},
        }
        if finished:
            (folder / "result.json").write_text(json.dumps(result))
        content = {"epochs": 5, "seed": 1, "optimizer": {"lr": 0.1}, "lr": {"by": "epoch"}, **recipe}
        content |= {"model": {"name": "resnet"}, "data": {"name": "cifar10", "root": None}}
        (folder / "config.yaml").write_text(json.dumps(content))
        command = ["train.py", "--local_rank=0", "quickstart", "sparsity.schedule=dense 1, sparse 1"]
        made_on = {"command": command, "python": "3.11.7", "cpu": "a processor", "cpu_cores": 2}
        (folder / "env.json").write_text(json.dumps({**made_on, "packages": {"torch": "2.13.0"}}))
        return RunDir(folder)

    return make


class Page(HTMLParser):
    """The text of a page without its style and scripts, and what its tags load from elsewhere."""

    def __init__(self, text):
        super().__init__()
        self.words, self.loads, self.hidden, self.open = [], [], 0, []
        self.feed(text)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.hidden += tag in ("style", "script")
        self.loads += [value for key, value in attributes if key in ("src", "href")]

    def handle_endtag(self, tag):
        self.hidden -= tag in ("style", "script")

    def handle_data(self, data):
        self.words += [] if self.hidden else [data]


def page_of(run):
    write_report(run)
    return Page(run.report.read_text())


def test_a_page_says_what_came_out_what_it_cost_and_how_to_repeat_it(make):
    page = page_of(make())
    for text in (
        "dense twin 53.25 %",
        "sparse model 54.50 %",
        "difference +1.25 points",
        "90.00 % of weights are 0",
        "resnet on cifar10 · 5 epochs · 5:00 min · 2 cores of a processor",
        "0.665 of dense training's FLOPs",
        "an image through the sparse model 0.222 of dense",
        "3 dense 1.000 3:00 min 1.000 1,001",
        "2 sparse 0.250 2:00 min 1.000 1,003",
        "all 5 0.700 5:00 min 1.000 1,002",
        "sparse 3 0.250 1:00 min 1.000 1,002 52.00",
        "conv1 10.00 %",
        "optimizer lr 0.1",
        "machine python 3.11.7",
        "packages torch 2.13.0",
        "acdc train quickstart 'sparsity.schedule=dense 1, sparse 1'",
    ):
        assert text in page.text
    assert page.loads == []  # opens from disk, without a network


def test_an_unfinished_run_has_a_page_too(make):
    page = page_of(make(finished=False))
    assert "not finished yet" in page.text
    assert "accuracy by epoch, %" in page.text
    assert "difference" not in page.text


@pytest.mark.parametrize(
    ("shown", "expected"),
    [(slice(None), "sparse 1"), (slice(3, None), " 3, dense 1, sparse 1"), (slice(4), " 1")],
)
def test_the_strip_of_phases_is_as_long_as_the_run_where_a_branch_begins_later(make, shown, expected):
    run = make(records=[epoch(i, kind) for i, kind in enumerate(KINDS)][shown])
    write_report(run)
    spans = re.findall(r'<i class="(\w*)" style="flex-grow:(\d+)"></i>', run.report.read_text())
    assert ", ".join(map(" ".join, spans)).endswith(expected)
    assert sum(int(count) for _, count in spans) == 5


def test_old_and_odd_records_are_drawn_as_far_as_they_go(make):
    bare = {
        key: value for key, value in epoch(0, "dense").items() if key not in ("seconds", "layer_sparsity")
    }
    for key in (
        "images_per_second",
        "data_wait",
        "mask_difference",
        "training_flops",
        "dense_training_flops",
    ):
        del bare[key]
    strange = epoch(1, "sparse", val_loss=float("nan"), train_loss=float("inf"))
    page = page_of(make(records=[bare, strange]))
    assert "accuracy by epoch, %" in page.text


def test_kernels_of_layers_are_listed(make):
    run = make()
    times = {"dense": 500.0, "sparse": 250.0}
    products = {"forward": times, "gradient": times, "weight_gradient": {"dense": 100.0, "sparse": None}}
    chosen = [
        {"layer": "conv1", "choice": "sparse fp32 1x7", "microseconds": products, "reason": ""},
        {"layer": "fc", "choice": "dense", "microseconds": None, "reason": "too small"},
    ]
    run.kernels.write_text(json.dumps(chosen))
    text = page_of(run).text
    assert "By layer: 1 sparse, 1 dense" in text
    assert "conv1 500 + 500 + 100 250 + 250 + - sparse" in text
    assert "fc - - dense too small" in text


def test_what_compressions_kept_dropped_and_regrew_is_drawn_by_its_share(make):
    records = [epoch(i, kind) for i, kind in enumerate(KINDS)]
    records[4] |= {"mask_kept": 80, "mask_dropped": 20, "mask_regrown": 10}
    run = make(records=records)
    text = page_of(run).text
    assert "regrown and dropped weights, %" in text
    assert "weights kept again, %" in text
    drawn = {
        title: value
        for data in numbers_of(run.report.read_text())
        for place, value in data["rows"][-1][2]
        for title in [data["series"][place][0]]
    }
    assert (drawn["kept"], drawn["dropped"], drawn["regrown"]) == ("80", "20", "10")


def numbers_of(text):
    return [json.loads(found) for found in re.findall(r'json">(.*?)</script>', text)]


def test_older_records_have_one_share_of_change(make):
    text = page_of(make()).text
    assert "mask change from compression to compression, % of the prunable weights" in text
    assert "weights kept again" not in text


def test_flops_of_older_records_are_those_of_dense_epochs(make):
    records = [epoch(i, kind) for i, kind in enumerate(KINDS)]
    for record in records:
        del record["dense_training_flops"]
    assert "2 sparse 0.250" in page_of(make(records=records)).text


def test_the_cost_of_a_branch_begins_with_its_own_epochs(make):
    records = [epoch(i, "dense") for i in (7, 8, 9)]
    for record, seconds in zip(records, (60.0, 120.0, 180.0), strict=True):
        record["seconds"] = seconds
    assert "3 dense 1.000 3:00 min 1.000" in page_of(make(records=records)).text


def test_a_branch_whose_images_grow_costs_what_a_dense_one_does_at_each_size(make):
    """Sums: its first epoch's own part is not known."""
    records = [epoch(i, kind) for i, kind in ((7, "dense"), (8, "dense"), (9, "sparse"))]
    for record, spent, dense in zip(records, (5e9, 6e9, 7e9), (5e9, 6e9, 10e9), strict=True):
        record |= {"training_flops": spent, "dense_training_flops": dense}
    assert "1 sparse 0.250" in page_of(make(records=records)).text


def test_learning_rates_within_epochs_are_drawn_where_they_change_there(make):
    steps = [{**epoch(0, "dense"), "kind": "step", "loss": 1.0, "step": 5, "lr": 0.75}]
    records = [*steps, *(epoch(i, kind) for i, kind in enumerate(KINDS))]
    for by, expected in (("epoch", [1, 2, 3, 4, 5]), ("step", [0.5, 1, 2, 3, 4, 5])):
        run = make(by, records=records, lr={"by": by})
        write_report(run)
        (data,) = (
            each for each in numbers_of(run.report.read_text()) if each["series"][0][0] == "learning rate"
        )
        assert [row[0] for row in data["rows"]] == expected


def test_names_cannot_become_tags(make):
    evil = "</script><script>alert(1)</script>"
    run = make(name="now", records=[epoch(0, "dense"), epoch(1, "sparse", layers=(evil,))], note=evil)
    write_report(run)
    text = run.report.read_text()
    assert evil not in text
    assert text.count("<script") == text.count("</script>")


def test_a_long_run_of_a_deep_network_stays_small(make):
    layers = [f"layer{i // 9}.{i % 9}.conv" for i in range(54)]
    records = []
    for i in range(100):
        kind = "sparse" if i % 10 > 5 else "dense"
        change = {"mask_kept": 900, "mask_dropped": 100, "mask_regrown": 90} if i % 10 == 6 else {}
        whole = epoch(i, kind, layers, step=1000 * (i + 1), **change)
        step = {key: whole[key] for key in ("epoch", "phase", "lr", "images_per_second", "data_wait")}
        step |= {"kind": "step", "loss": 1.0}
        within = ({**step, "step": 1000 * i + 10 * k} for k in range(1, 100))
        records += [*within, whole]
    run = make(records=records, lr={"by": "step"})
    times = {"dense": 1500.0, "sparse": 700.0}
    products = dict.fromkeys(("forward", "gradient", "weight_gradient"), times)
    chosen = [{"layer": name, "choice": "sparse fp32 1x7", "microseconds": products} for name in layers]
    run.kernels.write_text(json.dumps(chosen))
    begin = time.perf_counter()
    write_report(run)
    print(f"drawn in {time.perf_counter() - begin:.2f} s")
    assert 50_000 < run.report.stat().st_size < 400_000  # a mail's attachment; 2 MB were allowed


def test_points_are_where_their_values_belong():
    accuracy = Series("top-1", [(1, 0.0), (2, 50.0), (4, 100.0)], "dense", "dots")
    drawn = chart("accuracy", [accuracy], 4, [(2, 3)])
    circles = [tuple(map(float, found)) for found in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', drawn)]
    (x1, y1), (x2, y2), (x3, y3) = circles
    assert x3 - x2 == pytest.approx(2 * (x2 - x1), abs=0.2)
    assert y1 - y2 == pytest.approx(y2 - y3, abs=0.2)
    width, height = map(int, re.search(r'viewBox="0 0 (\d+) (\d+)"', drawn).groups())
    assert 0 < x1 < x3 < width
    assert 0 < y3 < y1 < height
    begin, width = map(
        float, re.search(r'rect class="sparse" x="([\d.]+)" .*?width="([\d.]+)"', drawn).groups()
    )
    assert begin == pytest.approx(x2, abs=0.2)
    assert width == pytest.approx(x2 - x1, abs=0.2)
    (data,) = numbers_of(drawn)
    assert data["rows"][1] == [2, "2", [[0, "50"]]]
    assert data["shaded"] == [[2, 3]]


def test_what_is_lost_is_drawn_below_zero_and_said_without_a_sign():
    both = [
        Series("regrown", [(1, 5.0)], "fourth", "steps"),
        Series("dropped", [(1, 5.0)], "fifth", "steps", True),
    ]
    drawn = chart("change", both, 1)
    zero = float(re.search(r'class="zero" d="M\d+ ([\d.]+)H', drawn)[1])
    up, down = (
        float(re.search(rf'"line {kind}" d="M[\d.]+ ([\d.]+)L', drawn)[1]) for kind in ("fourth", "fifth")
    )
    assert zero - up == pytest.approx(down - zero, abs=0.2)
    assert zero > up
    assert "-" not in re.sub(r"<[^>]*>", "", drawn.partition("<output>")[0])


def test_steps_hold_their_value_over_their_epoch():
    drawn = chart("sparsity", [Series("zeros", [(1, 0.0), (2, 90.0)], "kept", "steps")], 2)
    corners = [
        tuple(map(float, pair.split()))
        for pair in re.search(r'"line kept" d="M([^"]*)"', drawn)[1].split("L")
    ]
    (x1, low), (x2, still), (x3, high), (x4, top) = corners
    assert (low, high) == (still, top)
    assert x2 == x3
    assert x2 - x1 == pytest.approx(x4 - x3)


def test_a_scale_may_begin_at_zero():
    speed = [Series("speed", [(1, 900.0), (2, 1000.0)], "dense")]
    ticks = [
        re.findall(r'class="y"[^>]*>([\d,]+)<', chart("speed", speed, 2, from_zero=zero)) for zero in (0, 1)
    ]
    assert [each[0] for each in ticks] == ["900", "0"]


@pytest.mark.parametrize("value", [None, float("nan")])
def test_a_chart_without_values_is_left_out(value):
    assert chart("accuracy", [Series("top-1", [(1, value)], "dense")], 1) == ""


def test_spans_of_sparse_phases():
    assert phases(["dense", "sparse", "sparse", "dense", "sparse"]) == [(1, 3), (4, 5)]


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (12345.6, "12,346"), (90.25, "90.25"), (1e-6, "1e-06"), (0.0125, "0.0125")]
)
def test_numbers_are_short(value, text):
    assert number(value) == text


def test_several_runs_on_one_page(make, tmp_path, capsys):
    runs = [make("first"), make("second", seed=2, optimizer={"lr": 0.2}), make("third", finished=False)]
    write_comparison(runs, tmp_path / "runs.html")
    text = Page((tmp_path / "runs.html").read_text()).text
    assert "shop first 53.25 54.50 +1.25 90.00 0.665 5:00 min" in text
    assert "shop third - - - - not finished: 5 epochs" in text
    assert "seed 1 2 1" in text
    assert "optimizer.lr 0.1 0.2 0.1" in text
    out = tmp_path / "both.html"
    assert main(["report", *(str(run.path) for run in runs[:2]), "--out", str(out)]) == 0
    assert "2 runs" in Page(out.read_text()).text
    assert main(["report", *(str(run.path) for run in runs), "--picture", str(tmp_path / "a.svg")]) == 2
    assert "--picture draws one run" in capsys.readouterr().err


def test_runs_of_one_name_in_two_places_are_told_apart(make, tmp_path):
    run = make()
    other = RunDir(shutil.copytree(run.path, tmp_path / "elsewhere" / "shop" / "now"))
    write_comparison([run, other], tmp_path / "runs.html")
    text = Page((tmp_path / "runs.html").read_text()).text
    assert f"{run.path} 53.25" in text
    assert f"{other.path} 53.25" in text


def test_a_page_that_fails_costs_the_page_not_the_run(make, caplog):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    from trainer.summary import _report

    run = make()
    run.kernels.write_text("[1]")
    _report(run, {})
    assert "no report: 'int' object has no attribute 'get'" in caplog.text
    assert not run.report.exists()
