"""What the user sees of a run: a progress bar on a terminal, plain lines elsewhere, tables at the end."""

from __future__ import annotations

import threading
import time
from typing import Any

from rich.box import SIMPLE_HEAVY
from rich.console import Console
from rich.table import Table

from trainer.monitor.bar import Part, fit, start_bar

LINE_EVERY = 10.0  # seconds between plain lines, whatever the run is at


class Screen:
    """num_steps: optimizer steps of the whole run, of which `done` are behind us."""

    def __init__(self, num_steps: int, done: int, num_epochs: int, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        if not self.console.is_terminal:
            self.console.width = 110  # a log file has no width of its own
        self.num_steps, self.done, self.num_epochs = num_steps, done, num_epochs
        self._began = self._last_line = time.monotonic()
        self._started: tuple[float, int] | None = None  # time and steps done when the clock started
        self._status: list[Part] = []
        self._phase = self._working = ""
        self._bar = start_bar(self.console, self._now) if self.console.is_terminal and num_steps else None
        self._closed = threading.Event()
        if self._bar is None and num_steps:
            threading.Thread(target=self._write_lines, daemon=True).start()

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    def step(self, phase: str = "") -> None:
        """After every optimizer step. The first of this process compiles, so the clock starts behind it."""
        self.done += 1
        self._phase, self._working = phase, ""
        if self._started is None:
            self._started = (time.monotonic(), self.done)

    def working(self, what: str, done: int, total: int) -> None:
        """Progress of what happens between two steps and takes long."""
        self._working = f"{what} {done}/{total}"

    def status(self, epoch: int, phase: str, sparsity: float, loss: float, images_per_second: float) -> None:
        """What the bar shows, or the next plain line: figures read from the device just now."""
        self._status = [
            Part(3, f"epoch {epoch + 1:>{len(str(self.num_epochs))}}/{self.num_epochs}"),
            Part(0, f"{phase:6} {100 * sparsity:5.2f} %"),
            Part(4, f"loss {loss:.4f}"),
            Part(5, f"{images_per_second:,.0f} img/s"),
        ]

    def epoch(self, record: dict[str, Any]) -> None:
        """An epoch's line, which stays on the screen. On a narrow terminal it says less."""
        figures = (record[key] for key in ("sparsity", "train_loss", "images_per_second"))
        self.status(record["epoch"], record["phase"], *figures)
        top5, ema, skipped = f"top-5 {record['val_top5']:.2f}", "", ""
        if "ema_top1" in record:
            ema = f"EMA: top-1 {record['ema_top1']:.2f}"
        if record.get("skipped_steps"):
            skipped = f"{record['skipped_steps']} steps skipped so far"
        parts = [
            *self._status,
            Part(8, f"data wait {100 * record['data_wait']:.1f} %"),
            Part(1, f"test: loss {record['val_loss']:.4f} top-1 {record['val_top1']:.2f} {top5}"),
            Part(2, ema),
            Part(6, skipped),
            Part(9, self.time_left()),
        ]
        self._line(fit(parts, self.console.width if self.console.is_terminal else 10**6))

    def time_left(self) -> str:
        if self._started is None or self.done == self._started[1]:
            return ""
        pace = (time.monotonic() - self._started[0]) / (self.done - self._started[1])
        return f"{_clock(pace * (self.num_steps - self.done))} left"

    def close(self) -> None:
        self._closed.set()
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _now(self) -> tuple[float, list[Part]]:
        """For the bar or a line. Their threads call this while the run goes on."""
        share = self.done / self.num_steps
        place, left = Part(1, f"step {self.done:,}/{self.num_steps:,}"), Part(2, self.time_left())
        if self._working:
            return share, [Part(0, self._working), place, left]
        if self._started is None:
            return share, [Part(0, "first step"), place, Part(2, _clock(time.monotonic() - self._began))]
        where = self._status[:2] or [Part(0, self._phase)]
        return share, [*where, place, left, *self._status[2:]]

    def _write_lines(self) -> None:
        """A thread's: compiling, for one, keeps the run's own away for a minute."""
        while not self._closed.wait(1.0):
            self.line_if_late()

    def line_if_late(self) -> None:
        if time.monotonic() - self._last_line > LINE_EVERY:
            self._line(fit(self._now()[1], 10**6))

    def _line(self, text: str) -> None:
        self.say(text)
        self._last_line = time.monotonic()


def _clock(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def closing_table(result: dict[str, Any]) -> Table:
    """Dense twin and sparse model: accuracy, sparsity, FLOPs of one image, and those against dense."""
    table = Table(box=SIMPLE_HEAVY)
    for column in ("", "top-1 %", "top-5 %", "loss", "sparsity %", "epoch", "FLOPs", "vs dense"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    names = {"dense_twin": "dense twin", "sparse": "sparse model", "finetuned_dense": "dense, finetuned"}
    names |= {f"{key}_ema": f"{name}, EMA" for key, name in names.items()}
    for key, name in names.items():
        if (row := result.get(key)) is None:
            continue
        table.add_row(
            name,
            f"{row['top1']:.2f}",
            f"{row['top5']:.2f}",
            f"{row['loss']:.4f}",
            f"{100 * row['sparsity']:.3f}",
            str(row["epoch"] + 1),
            count(row["inference_flops"]),
            f"{row['inference_flops'] / result['flops']['inference_dense']:.3f}",
        )
    return table


def closing_lines(result: dict[str, Any]) -> list[str]:
    flops, compiled = result["flops"], result["compile"]
    lines = [
        f"training    {count(flops['training'])}FLOPs, {flops['training_ratio']:.3f} of dense training's",
        f"compiled    {compiled['graphs']} graphs, {compiled['recompilations']} more after the first epoch",
        f"time        {result['seconds']:.0f} s",
    ]
    if speed := result["speed"]:
        dense, compressed = (speed[f"{kind}_images_per_second"] for kind in ("dense", "compressed"))
        lines.insert(
            1,
            f"speed       compressed phases {compressed:,.0f} img/s, dense {dense:,.0f}: "
            f"{compressed / dense:.2f} times as fast; training took {speed['time_of_dense']:.2f} of a dense "
            "run's time",
        )
    if result["dense_twin"] and result["sparse"]:
        gap = result["sparse"]["top1"] - result["dense_twin"]["top1"]
        lines.insert(0, f"accuracy    the sparse model is {gap:+.2f} points from its dense twin")
    return lines


def count(number: float) -> str:
    """A number in engineering units: 18.9 M."""
    units = ["", "k", "M", "G", "T", "P", "E"]
    while abs(number) >= 1000 and len(units) > 1:
        number, units = number / 1000, units[1:]
    return f"{number:.3g} {units[0]}"
