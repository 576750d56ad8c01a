"""What the quickstart promises, measured: make claims

Runs the quickstart as a user does, with nothing compiled beforehand, then again on two ranks while looking at
the state after every step. Prints a table of promise, measurement and verdict, and writes the record as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.shared.record import parse, show_table, write_record
from trainer.errors import exit_code_of

COLUMNS = ("promise", "bar", "measured", "holds")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for both runs, e.g. seed=2")
    options = parse(parser, "quickstart")
    with tempfile.TemporaryDirectory() as folder:
        cold, seconds = run_cold(Path(folder), options.overrides)
        watched = run_watched(Path(folder), options.overrides)
    rows = judge(cold, seconds, watched)
    shown = [(*texts, "yes" if holds else "NO") for *texts, holds in rows]
    show_table(COLUMNS, shown, texts=COLUMNS)
    record: dict[str, Any] = {"overrides": options.overrides, "result": cold, "two_ranks": watched}
    record["claims"] = [dict(zip(COLUMNS, row, strict=True)) for row in rows]
    write_record(options.out, record)
    return 0 if all(holds for *_, holds in rows) else 1


def run_cold(folder: Path, overrides: list[str]) -> tuple[dict[str, Any], float]:
    """`acdc train quickstart` with empty caches: result.json and the seconds of the whole command."""
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "compiled")}
    begin = time.monotonic()
    arguments = ["train", "quickstart", f"run_root={folder / 'cold'}", *overrides]
    subprocess.run(
        [sys.executable, "-m", "trainer.cli.main", *arguments], check=True, env={**os.environ, **cache}
    )
    seconds = time.monotonic() - begin
    (path,) = (folder / "cold").glob("*/*/result.json")
    result = json.loads(path.read_text(encoding="utf-8"))
    del result["run"]  # a temporary folder
    return result, seconds


def run_watched(folder: Path, overrides: list[str]) -> list[dict[str, Any]]:
    """benchmarks.invariants on two ranks of the CPU: what each of them saw."""
    code = "import sys; from trainer.cli.launch import launch; sys.exit(launch(sys.argv[1:], 2))"
    arguments = [str(folder), "quickstart", f"run_root={folder / 'watched'}", *overrides]
    command = [sys.executable, "-c", code, "benchmarks.invariants", *arguments]
    subprocess.run(
        command, check=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    )
    return [json.loads((folder / f"rank{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]


def judge(
    cold: dict[str, Any], seconds: float, watched: list[dict[str, Any]]
) -> list[tuple[str, str, str, bool]]:
    """Rows of promise, bar, measurement and whether it holds."""
    dense, sparse = cold["dense_twin"], cold["sparse"]
    gap = sparse["top1"] - dense["top1"]
    off = abs(sparse["num_weights"] - sparse["num_kept"] - 0.9 * sparse["num_weights"])
    own = int(cold["kernels"] > 0)  # sparse kernels have a graph of their own, made at the first compression
    graphs, recompilations = cold["compile"]["graphs"], cold["compile"]["recompilations"] - own
    leaks = sum(seen["leaks"] for seen in watched)
    looks = watched[0]["looks"]
    momentum = max(value for seen in watched for value in seen["momentum_after_decompression"])
    switches = len(watched[0]["masks"]), len(watched[0]["momentum_after_decompression"])
    equal = watched[0]["masks"] == watched[1]["masks"]
    cores = len(os.sched_getaffinity(0))
    return [
        ("dense twin, top-1", "at least 87 %", f"{dense['top1']:.2f} %", dense["top1"] >= 87),
        ("sparse model against it", "at most 1.0 point below", f"{gap:+.2f} points", gap >= -1),
        ("number of dropped weights", "90 % to within one", f"off by {off:.1f}", off <= 1),
        ("dropped weights that are not 0", "0 after every step", f"{leaks} in {looks} looks", leaks == 0),
        ("momentum after decompression", "0", f"{momentum} over {switches[1]}", momentum == 0),
        ("compiled graphs", "2, and 1 of sparse kernels", str(graphs), graphs == 2 + own),
        ("recompilations at switches", "0", str(recompilations), recompilations == 0),
        ("masks on two ranks", "equal", f"equal in {switches[0]}" if equal else "different", equal),
        ("whole command, cold", "300 s on 2 cores", f"{seconds:.0f} s on {cores} cores", seconds <= 300),
    ]


if __name__ == "__main__":
    raise SystemExit(exit_code_of(main))
