"""What a run shows while it goes: a bar that fits any terminal, plain lines where there is none."""

import io
import time

import pytest
from rich.console import Console

from trainer.monitor import screen as module
from trainer.monitor.bar import Part, bar_line, fit
from trainer.monitor.screen import Screen

WIDTHS = (20, 60, 80, 200)


def screen_of(width, terminal=True):
    file = io.StringIO()
    console = Console(file=file, width=width, height=50, force_terminal=terminal, highlight=False)
    return Screen(1_200_000, 0, 300, console), file


@pytest.fixture
def clock(monkeypatch):
    """time.monotonic() as a list of one number."""
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("phase", ["sparse", "a phase whose name has not been kept short by anybody, at all"])
def test_the_bar_is_one_line_that_fits(width, phase, clock):
    screen, _ = screen_of(width)
    drawn = []

    def look():
        drawn.append(bar_line(*screen._now(), width))
        assert drawn[-1].cell_len <= width
        assert "\n" not in drawn[-1].plain

    look()
    for _ in range(3):
        clock[0] += 0.5
        screen.step(phase)
        screen.status(256, phase, 0.9, 123.456789, 1_234_567.0)
        look()
    screen.working("measuring kernels of all layers that there are", 12, 345)
    look()
    screen.close()
    if phase == "sparse":
        assert ("sparse 90.00 %  step 3/1,200,000  166:39:58 left" in drawn[3].plain) == (width >= 60)
        assert ("─" in drawn[3].plain) == (width >= 60)
    assert ("loss 123.4568  1,234,567 img/s" in drawn[3].plain) == (width == 200)


def test_what_matters_least_goes_first():
    parts = [Part(3, "epoch 1"), Part(0, "dense"), Part(1, "step 1/2"), Part(2, "")]
    assert fit(parts, 30) == "epoch 1  dense  step 1/2"
    assert fit(parts, 23) == "dense  step 1/2"
    assert fit(parts, 14) == "dense"
    assert fit(parts, 3) == "den"
    assert bar_line(0.5, parts, 36, ascii_only=True).plain == "#####-----  epoch 1  dense  step 1/2"
    assert bar_line(0.5, parts, 24, ascii_only=True).plain == "###----  dense  step 1/2"
    assert bar_line(0.5, parts, 22, ascii_only=True).plain == "dense  step 1/2"


def test_an_epochs_line_fits_a_terminal_and_says_all_in_a_file(clock):
    record = {"epoch": 1, "phase": "dense", "sparsity": 0.0, "train_loss": 1.0, "images_per_second": 9.0}
    record |= {"data_wait": 0.1, "val_loss": 2.0, "val_top1": 50.0, "val_top5": 90.0, "skipped_steps": 3}
    said = {}
    for width, terminal in ((80, True), (80, False)):
        screen, file = screen_of(width, terminal)
        screen.epoch(record)
        screen.close()
        said[terminal] = next(line for line in file.getvalue().splitlines() if "test: loss" in line)
    assert (
        "data wait 10.0 %  test: loss 2.0000 top-1 50.00 top-5 90.00  3 steps skipped so far" in said[False]
    )
    assert len(said[True]) <= 80
    assert "dense   0.00 %" in said[True]


def test_without_a_terminal_a_line_comes_every_ten_seconds(clock):
    """From the first second on: what is compiled then takes longest."""
    screen, file = screen_of(80, terminal=False)
    screen.close()  # the thread, which would ask by itself
    for second in range(36):
        clock[0] += 1.0
        if second >= 12:
            screen.step("dense")
        if second >= 24:
            screen.working("measuring kernels", second, 99)
        screen.line_if_late()
    assert file.getvalue().splitlines() == [
        "first step  step 0/1,200,000  0:00:11",
        "dense  step 10/1,200,000  333:19:50 left",
        "measuring kernels 32/99  step 21/1,200,000  333:19:39 left",
    ]


def test_without_a_terminal_a_run_that_compiles_is_not_silent(monkeypatch):
    monkeypatch.setattr(module, "LINE_EVERY", 0.5)
    screen, file = screen_of(80, terminal=False)
    time.sleep(2.5)
    screen.close()
    assert "first step  step 0/1,200,000  0:00:01" in file.getvalue()
