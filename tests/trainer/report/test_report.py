"""Report pages: what they show, in which places, of whole, old, unfinished and hostile records."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from trainer.checkpoints.run_dir import RunDir
from trainer.cli.main import main
from trainer.report.charts import HEIGHT, WIDTH, Series, chart, number, phases
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
        (folder / "config.yaml").write_text(json.dumps({"seed": 1, "optimizer": {"lr": 0.1}, **recipe}))
        command = ["train.py", "--local_rank=0", "quickstart", "sparsity.schedule=dense 1, sparse 1"]
        (folder / "env.json").write_text(json.dumps({"command": command}))
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
        "0.665 of dense training",
        "0.222 of dense",
        "dense phases 3 epochs, 3:00 min, 1,001 images/s",
        "sparse phases 2 epochs, 2:00 min, 1,003 images/s",
        "conv1 10.00 %",
        "acdc train quickstart 'sparsity.schedule=dense 1, sparse 1'",
    ):
        assert text in page.text
    assert page.loads == []  # opens from disk, without a network


def test_an_unfinished_run_has_a_page_too(make):
    page = page_of(make(finished=False))
    assert "not finished yet" in page.text
    assert "accuracy, %" in page.text
    assert "difference" not in page.text


def test_old_and_odd_records_are_drawn_as_far_as_they_go(make):
    bare = {
        key: value for key, value in epoch(0, "dense").items() if key not in ("seconds", "layer_sparsity")
    }
    del bare["images_per_second"], bare["data_wait"], bare["mask_difference"]
    strange = epoch(1, "sparse", val_loss=float("nan"), train_loss=float("inf"))
    page = page_of(make(records=[bare, strange]))
    assert "accuracy, %" in page.text


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
    assert "conv1 500 + 500 + 100 250 + 250 + - sparse" in text
    assert "fc - - dense too small" in text


def test_names_cannot_become_tags(make):
    evil = "</script><script>alert(1)</script>"
    run = make(name="now", records=[epoch(0, "dense"), epoch(1, "sparse", layers=(evil,))], note=evil)
    write_report(run)
    text = run.report.read_text()
    assert evil not in text
    assert text.count("<script") == text.count("</script>")


def test_a_long_run_of_a_deep_network_stays_small(make):
    layers = [f"layer{i // 9}.{i % 9}.conv" for i in range(54)]
    records = [epoch(i, "sparse" if i % 10 > 5 else "dense", layers) for i in range(100)]
    run = make(records=records)
    write_report(run)
    assert run.report.stat().st_size < 200_000


def test_points_are_where_their_values_belong():
    drawn = chart(
        "accuracy", [Series("top-1", [(1, 0.0), (2, 50.0), (4, 100.0)], "dense", "dots")], 4, [(2, 3)]
    )
    circles = [tuple(map(float, found)) for found in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', drawn)]
    (x1, y1), (x2, y2), (x3, y3) = circles
    assert x3 - x2 == pytest.approx(2 * (x2 - x1), abs=0.2)
    assert y1 - y2 == pytest.approx(y2 - y3, abs=0.2)
    assert 0 < min(x1, y3) < max(x3, y1) < max(WIDTH, HEIGHT)
    begin, width = map(
        float, re.search(r'rect class="sparse" x="([\d.]+)" .*?width="([\d.]+)"', drawn).groups()
    )
    assert begin == pytest.approx(x2, abs=0.2)
    assert width == pytest.approx(x2 - x1, abs=0.2)
    shown = json.loads(re.search(r'json">(.*?)</script>', drawn)[1])
    assert shown[1] == [x2, ["epochs done: 2", "top-1: 50"]]


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
    assert "shop first 53.25 54.50 +1.25 90.00 0.665" in text
    assert "shop third - - - - not finished" in text
    assert "seed 1 2 1" in text
    assert "optimizer.lr 0.1 0.2 0.1" in text
    out = tmp_path / "both.html"
    assert main(["report", *(str(run.path) for run in runs[:2]), "--out", str(out)]) == 0
    assert "2 runs" in Page(out.read_text()).text
    assert main(["report", *(str(run.path) for run in runs), "--picture", str(tmp_path / "a.svg")]) == 2
    assert "--picture draws one run" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["1280,900", "390,800"])
def test_a_browser_draws_it_without_an_error(make, tmp_path, size):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium on this machine")
    run = make()
    write_report(run)
    text = run.report.read_text()
    # what a reader does: point at the middle of each chart, then look at what is shown, and at what overflows
    probe = """
    window.errors = []; window.addEventListener("error", (event) => errors.push(event.message));
    window.addEventListener("load", () => {
      const seen = [...document.querySelectorAll("figure")].map((figure) => {
        const svg = figure.querySelector("svg"), box = svg.getBoundingClientRect();
        const at = {clientX: box.left + box.width / 2, clientY: box.top + 9};
        svg.dispatchEvent(new PointerEvent("pointermove", at));
        const shown = figure.querySelector("output"), place = shown.getBoundingClientRect();
        return shown.style.visibility + place.left.toFixed() + shown.textContent.split("\\n")[0].slice(0, 12);
      });
      const wide = document.documentElement.scrollWidth > innerWidth;
      document.title = JSON.stringify({errors, seen, wide});
    });"""
    run.report.write_text(text.replace("<body>", f"<body><script>{probe}</script>", 1))
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--window-size={size}", "--dump-dom"]
    done = subprocess.run(
        [browser, *options, f"--user-data-dir={tmp_path / 'profile'}", run.report.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    found = json.loads(re.search(r"<title>(.*?)</title>", done.stdout)[1])
    assert found["errors"] == []
    assert not found["wide"]
    assert len(found["seen"]) == 7
    assert all(seen.startswith("visible") and seen.endswith("epochs done:") for seen in found["seen"])
