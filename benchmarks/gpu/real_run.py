"""One short run as users make them: JPEGs, DALI, DeepSpeed, compiled, both phases, killed and resumed.

Makes images, trains three epochs (dense, compressed, dense) with evaluations and checkpoints, kills the
process within the compressed phase, and lets a second one go on from its checkpoint to the end. The record
has what both said and what the run wrote, and is written again whenever there is more.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.data_pipeline import make_tree
from benchmarks.shared.record import Parser, parse, settings, write_record
from trainer.errors import exit_code_of

PHASES = "dense 1, sparse 1, dense 1"
LINES = 60  # of the end of what a process said
EPOCH_KEYS = (
    *("epoch", "step", "phase", "lr", "train_loss", "val_loss", "val_top1", "sparsity"),
    *("images_per_second", "data_wait", "graphs", "seconds"),
)


def main() -> int:
    parser = Parser("real_run", __doc__)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the recipe, besides")
    parser.add_number("--images", 1024, "JPEG files to make")
    parser.add_number("--batch", 256, "images in a step; an epoch has all images")
    parser.add_number("--seconds", 300, "that each of both processes may take")
    options = parse(parser, "real_run")
    with tempfile.TemporaryDirectory() as folder:
        content = {"options": settings(options)}
        content |= run(Path(folder), options, partial(write_record, options.out, quietly=True))
    write_record(options.out, content)
    print(json.dumps(content["verdicts"], indent=1))
    return 0 if all(content["verdicts"].values()) else 1


def run(folder: Path, options: argparse.Namespace, on_more: Any) -> dict[str, Any]:
    """Everything that is known of the run. on_more: called with it as it grows."""
    found: dict[str, Any] = {"verdicts": {}}
    begin = time.monotonic()
    root = make_tree(folder / "images", options.images, options.batch)
    found["making_images_seconds"] = time.monotonic() - begin
    on_more(found)
    steps = options.images // options.batch
    overrides = [
        f"data.root={root}",
        f"run_root={folder / 'runs'}",
        f"data.batch_size={options.batch}",
        f"data.eval_batch_size={min(64, options.batch)}",
        "lr.warmup_epochs=0",
        "epochs=3",
        f"sparsity.schedule={PHASES}",
        f"steps_per_epoch={steps}",
        f"save.every={max(1, steps // 2)}st",
        *options.overrides,
    ]
    # within the compressed phase, behind its first half
    kill_at = steps + max(1, steps // 2)
    found["killed"] = train(folder, overrides, options.seconds, kill_at)
    runs = sorted((folder / "runs").glob("*/*/"))
    found["verdicts"]["killed by the signal"] = found["killed"]["exit_code"] == -9
    on_more(found)
    if not runs:
        return found
    found["resumed"] = train(folder, [*overrides, f"resume={runs[0]}"], options.seconds)
    read_run(runs[0], found)
    on_more(found)
    return found


def train(folder: Path, overrides: list[str], seconds: float, kill_at: int | None = None) -> dict[str, Any]:
    """One process of training, killed at the checkpoint of a step or when its time is over: exit code,
    seconds, the end of what it said, and when each checkpoint was there."""
    log, begin, seen = folder / "log", time.monotonic(), dict[str, float]()
    command = [sys.executable, "-m", "trainer.train", "imagenet/resnet50_90", *overrides]
    with log.open("wb") as output, log.open(encoding="utf-8", errors="replace") as said:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                print(said.read(), end="", flush=True)
                now = time.monotonic() - begin
                for state in (folder / "runs").glob("*/*/checkpoints/step-*"):
                    seen.setdefault(state.name, now)
                due = kill_at is not None and any(int(name.removeprefix("step-")) >= kill_at for name in seen)
                if due or now > seconds:
                    break
                time.sleep(0.02)
        finally:
            process.kill()  # by SIGKILL: at SIGTERM a run would save and stop by itself
            process.wait()
        print(said.read(), flush=True)
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return {
        "exit_code": process.returncode,
        "seconds": time.monotonic() - begin,
        "checkpoints_seen_at": seen,
        "said": lines[:LINES] if len(lines) <= LINES else [*lines[: LINES // 2], "...", *lines[-LINES:]],
    }


def read_run(run: Path, found: dict[str, Any]) -> None:
    """Add what the run wrote down, and whether it is as it should be."""
    metrics = run / "metrics.jsonl"
    records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    epochs = [record for record in records if record["kind"] == "epoch"]
    found["epochs"] = [{key: record.get(key) for key in EPOCH_KEYS} for record in epochs]

    result = json.loads((run / "result.json").read_text()) if (run / "result.json").exists() else None
    found["result"] = result
    if (run / "kernels.json").exists():
        found["kernels"] = json.loads((run / "kernels.json").read_text(encoding="utf-8"))
    begins = [line for line in found["resumed"]["said"] if line.startswith("begins")]
    found["resumed_at"] = begins[0].split(maxsplit=1)[1] if begins else None
    losses = [record[key] for record in epochs for key in ("train_loss", "val_loss")]
    found["verdicts"] |= {
        "resumed within the compressed phase": "epoch 1, step" in (found["resumed_at"] or ""),
        "ended well": found["resumed"]["exit_code"] == 0 and result is not None,
        "three epochs": [record["phase"] for record in epochs] == ["dense", "sparse", "dense"],
        # no more: four steps without warm-up leave BatchNorm's statistics far off, and a test loss of
        # millions is no fault
        "finite losses": bool(losses) and all(loss is not None and math.isfinite(loss) for loss in losses),
        "0 recompilations": result is not None and result["compile"]["recompilations"] == 0,
    }


if __name__ == "__main__":
    raise SystemExit(exit_code_of(main))
