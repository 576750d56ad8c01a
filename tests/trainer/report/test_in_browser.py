"""Pages as readers see them: report and comparison in headless Chromium, wide and on a phone, light and dark.

Screenshots stay in test-artefacts/ to be looked at.
"""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from tests.browser import ARTEFACTS, Browser, find_browser
from trainer.checkpoints.run_dir import RunDir
from trainer.monitor.records import Monitor
from trainer.monitor.screen import Screen
from trainer.report.compare import write_comparison
from trainer.report.run import write_report

KINDS = ["dense"] * 2 + (["sparse"] * 2 + ["dense"] * 2) * 3 + ["sparse"] * 4
LAYERS = ("conv1", "layer1.0.conv1", "layer1.0.downsample.0", "fc")
WIDTHS, SCHEMES = (1280, 390), ("light", "dark")
TINY = 320  # pixels: the narrowest phones

# What a page shows, and what is wrong with how it shows it
LOOK = """(() => {
  const shown = (each) => each.getClientRects().length > 0, box = (each) => each.getBoundingClientRect();
  const apart = (a, b) => a.right <= b.left || b.right <= a.left || a.bottom <= b.top || b.bottom <= a.top;
  const texts = [], clashes = [];
  for (const svg of [...document.querySelectorAll("svg")].filter(shown)) {
    const labels = [...svg.querySelectorAll("text:not(.star)")];
    texts.push(...labels.map((each) => box(each).height));
    labels.forEach((a, i) => labels.slice(i + 1).forEach((b) => {
      if (!apart(box(a), box(b))) clashes.push(`${a.textContent} on ${b.textContent}`);
    }));
    const inside = (a, b) => a.left >= b.left - 1 && a.right <= b.right + 1;
    clashes.push(...labels.filter((each) => !inside(box(each), box(svg))).map((each) => each.textContent));
  }
  const pair = [...document.querySelectorAll(".cards b")].map((each) => each.textContent);
  const color = getComputedStyle(document.body).backgroundColor;
  return {
    headings: [...document.querySelectorAll("h2")].map((each) => each.textContent),
    figures: document.querySelectorAll("figure").length,
    drawn: [...document.querySelectorAll("svg")].filter(shown).length,
    stars: [...document.querySelectorAll("svg text.star")].filter(shown).length,
    dots: [...document.querySelector("figure").querySelectorAll("circle")].filter(shown).length,
    bars: [...document.querySelectorAll(".layers .bar i")].map((each) => Math.round(box(each).width)),
    wide: document.documentElement.scrollWidth > innerWidth,
    smallest: Math.min(...texts), clashes, pair, color,
  };
})()"""

# What a reader does: point at the middle of each drawing. What is said there, and whether it is on the page
POINT = """[...document.querySelectorAll("figure")].map((figure) => {
  const svg = [...figure.querySelectorAll("svg")].find((each) => each.getClientRects().length > 0);
  const box = svg.getBoundingClientRect(), shown = figure.querySelector("output");
  const middle = {clientX: box.left + box.width / 2, clientY: box.top + 9};
  svg.dispatchEvent(new PointerEvent("pointermove", middle));
  const place = shown.getBoundingClientRect();
  const seen = [getComputedStyle(shown).visibility, shown.innerText.replace(/\\s+/g, " ")];
  svg.dispatchEvent(new PointerEvent("pointerleave"));
  return [...seen, place.left >= 0 && place.right <= innerWidth, getComputedStyle(shown).visibility];
})"""

# TensorBoard's charts: each of its elements has a tree of its own
CHARTS = """(() => {
  const within = (root) => [...root.querySelectorAll("*")].flatMap(
    (each) => [each, ...(each.shadowRoot ? within(each.shadowRoot) : [])]);
  const smoothing = within(document).find((each) => each.tagName == "TF-SMOOTHING-INPUT");
  const cards = within(document).filter((each) => each.tagName == "TF-CUSTOM-SCALAR-MULTI-LINE-CHART-CARD");
  return cards.map((card) => {
    const all = within(card.shadowRoot), drawn = (each) => (each.getAttribute("d") || "").length > 1;
    const lines = all.filter((each) => each.tagName == "path" && each.classList.contains("line"));
    const heading = all.find((each) => each.tagName == "TF-CARD-HEADING");
    return {title: heading.displayName, lines: lines.filter(drawn).length, smoothing: smoothing.weight};
  });
})()"""


@pytest.fixture(scope="module")
def browser():
    path = find_browser()
    if path is None:
        pytest.skip("no Chromium on this machine; make chromium installs it")
    with Browser(path) as opened:
        yield opened


def epoch(i, kind):
    compressed = kind == "sparse" and KINDS[i - 1] == "dense"
    change = {"mask_kept": 900 - 10 * i, "mask_dropped": 100 + 10 * i, "mask_regrown": 100 + 10 * i}
    return {
        "epoch": i,
        "step": 100 * (i + 1),
        "phase": kind,
        "lr": 0.1 - 0.005 * i,
        "train_loss": 2 / (i + 1),
        "val_loss": 2.1 / (i + 1),
        "val_top1": 90 - 40 / (i + 1) - 5 * (kind == "sparse"),
        "val_top5": 99.0,
        "sparsity": 0.9 * (kind == "sparse"),
        "mask_difference": 0.02 if compressed and i > 2 else None,
        **(change if compressed and i > 2 else {}),
        "images_per_second": 2000.0 + 700 * (kind == "sparse"),
        "data_wait": 0.02,
        "seconds": 3700.0 * (i + 1),
        "graphs": 2,
        "training_flops": 1e15 * (i + 1),
        "dense_training_flops": 1.5e15 * (i + 1),
    }


def kept(kind):
    share = 0.9 * (kind == "sparse")
    return {name: share * k / 4 for k, name in enumerate(LAYERS, 1)}


def write_run(folder, number=0):
    """A finished run."""
    folder.mkdir(parents=True)
    recipe = {
        "epochs": len(KINDS),
        "seed": number,
        "model": {"name": "resnet50"},
        "data": {"name": "imagenet"},
    }
    (folder / "config.yaml").write_text(json.dumps(recipe))
    made_on = {
        "command": ["train.py", "imagenet/resnet50_90"],
        "python": "3.11.7",
        "gpus": ["NVIDIA H200"] * 8,
    }
    (folder / "env.json").write_text(json.dumps(made_on))
    records = [
        {"kind": "epoch", **epoch(i, kind), "layer_sparsity": kept(kind)} for i, kind in enumerate(KINDS)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    row = {"top5": 99.0, "loss": 1.0, "num_images": 50000}
    result = {
        "schedule": "dense 2, (sparse 2, dense 2) x3, sparse 4",
        "dense_twin": {**row, "epoch": 13, "top1": 87.14, "sparsity": 0.0},
        "sparse": {**row, "epoch": 17, "top1": 82.78 + number, "sparsity": 0.9},
        "flops": {"training_ratio": 0.667, "inference_ratio": 0.222},
    }
    (folder / "result.json").write_text(json.dumps(result))
    times = {"dense": 1500.0, "sparse": 700.0}
    products = dict.fromkeys(("forward", "gradient", "weight_gradient"), times)
    chosen = [{"layer": name, "choice": "sparse fp32 1x7", "microseconds": products} for name in LAYERS]
    (folder / "kernels.json").write_text(json.dumps(chosen))
    return RunDir(folder)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """By name, their addresses."""
    root = tmp_path_factory.mktemp("pages")
    runs = [write_run(root / "imagenet" / f"2026112{number}-101500", number) for number in range(3)]
    for run in runs:
        write_report(run)
    write_comparison(runs, root / "runs.html")
    return {"report": runs[0].report.as_uri(), "runs": (root / "runs.html").as_uri(), "root": root}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["report", "runs"])
def test_pages_are_drawn_whole(browser, pages, name, width, scheme):
    browser.open(pages[name], width, dark=scheme == "dark")
    seen, pointed = browser.run(LOOK), browser.run(POINT)
    browser.screenshot(ARTEFACTS / f"{name}-{width}-{scheme}.png")
    assert browser.errors == []
    assert not seen["wide"]
    assert seen["clashes"] == []
    assert seen["smallest"] >= 12  # pixels a line of a chart's text
    assert seen["drawn"] == seen["figures"] == len(pointed) > 6
    light = sum(map(int, seen["color"].removeprefix("rgb(").removesuffix(")").split(", "))) > 600
    assert light == (scheme == "light")
    for visible, text, within, after in pointed:
        assert (visible, within, after) == ("visible", True, "hidden")
        assert text.startswith("epochs done: ")
    if name == "report":
        assert seen["pair"] == ["87.14 %", "82.78 %", "\u22124.36"]
        assert (seen["stars"], seen["dots"]) == (2, len(KINDS))
        assert seen["bars"] == sorted(seen["bars"], reverse=True)  # each layer keeps less than the one before
        assert seen["bars"][-1] * 3 < seen["bars"][0]
        for heading in ("Accuracy", "What it cost", "Masks", "Training", "Speed", "To repeat it"):
            assert heading in seen["headings"]
        said = "9 test top-1 85.56 evaluated dense 85.56"
        if width == 390:
            said = "8, sparse phase test top-1 80 evaluated sparse 80"
        assert pointed[0][1] == f"epochs done: {said}"
    else:
        assert pointed[0][1].count("imagenet 2026112") == 3
        assert "Where their recipes differ" in seen["headings"]


def test_pages_fit_the_narrowest_phones(browser, pages):
    for name in ("report", "runs"):
        browser.open(pages[name], TINY)
        assert not browser.run(LOOK)["wide"]


def test_a_page_prints_on_white_with_everything_unfolded(browser, pages):
    browser.open(pages["report"], 720, dark=True, media="print")
    browser.run("dispatchEvent(new Event('beforeprint'))")
    assert browser.run(LOOK)["color"] == "rgb(255, 255, 255)"
    assert browser.run("[...document.querySelectorAll('details')].every((each) => each.open)")
    browser.screenshot(ARTEFACTS / "report-print.png")
    assert browser.errors == []


@pytest.fixture
def board(pages):
    """The address of a TensorBoard on a run's records."""
    monitor = Monitor(RunDir(pages["root"] / "imagenet" / "20261120-101500"), Screen(0, 0, 0), 0)
    for i, kind in enumerate(KINDS):
        monitor.epoch(epoch(i, kind), kept(kind))
    monitor.close()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = ["-m", "tensorboard.main", "--logdir", str(pages["root"]), "--port", str(port)]
    process = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )
    try:
        for line in process.stderr:  # it says when it listens
            if b"http://localhost" in line:
                break
        else:
            pytest.fail("TensorBoard has ended")
        yield f"http://localhost:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stderr.close()


@pytest.mark.rare
def test_tensorboard_opens_on_the_page_of_acdc(browser, board):
    for width in WIDTHS:
        for scheme in SCHEMES:
            dark = str(scheme == "dark").lower()
            place = f"?smoothing=0&darkMode={dark}#custom_scalars&_smoothingWeight=0"
            browser.open(f"{board}/{place}", width, 1000)
            browser.wait_for(
                f"{CHARTS}.filter((each) => each.lines > 0).length >= {3 if width == 390 else 6}"
            )
            charts = browser.run(CHARTS)
            browser.screenshot(ARTEFACTS / f"board-{width}-{scheme}.png", 1000)
            assert browser.errors == []
            lines = {each["title"]: each["lines"] for each in charts}
            assert lines["test top-1, %"] == 2  # evaluated dense, evaluated sparse
            assert {"loss", "sparsity", "mask change", "images per second", "learning rate"} <= lines.keys()
            assert {each["smoothing"] for each in charts} == {0}
