"""A recipe small enough to run in two seconds, and what the tests of whole runs share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.build import build_trainer
from trainer.checkpoints import checkpoint
from trainer.config.load import load_config
from trainer.distributed.ranks import free_port, start
from trainer.errors import Stopped, UserError
from trainer.loop import Trainer
from trainer.train import main

SCHEDULE = "dense 1, (sparse 1, dense 1) x2, sparse 1"
NUM_STEPS = 60  # 320 images in batches of 32, 6 epochs


def tiny(data: Path, run_root: Path, *overrides: str) -> list[str]:
    """The arguments of a run of quickstart on a tiny data set with a tiny model, not compiled."""
    return [
        "quickstart",
        f"run_root={run_root}",
        f"data.root={data}",
        "data.batch_size=32",
        "data.crop_padding=2",
        "model.arguments.width=8",  # not less: see check_convolutions
        "epochs=6",
        f"sparsity.schedule={SCHEDULE}",
        "engine.compile=false",
        "engine.precision=fp32",  # the same on all CPUs; the choice by hardware: test_precision
        "sparsity.accelerate=off",  # what is measured to win depends on the machine
        "log.every=4st",
        *overrides,
    ]


def tiny_images(tree: Path, run_root: Path, *overrides: str) -> list[str]:
    """The arguments of a run of an ImageNet recipe on a small tree of small images, not compiled."""
    return [
        "imagenet/mobilenetv1_90",
        f"data.root={tree}",
        f"run_root={run_root}",
        "model.name=resnet20",
        "epochs=4",
        "sparsity.schedule=(dense 1, sparse 1) x2",
        "lr.warmup_epochs=1",
        "optimizer.lr=0.05",
        "data.batch_size=8",
        "data.eval_batch_size=4",
        "data.image_size=32",
        "data.eval_resize=36",
        "data.eval_size=32",
        "engine.compile=false",
        "engine.precision=fp32",
        "sparsity.accelerate=off",
        *overrides,
    ]


def starts(recipe: str) -> list[str]:
    """What a recipe that goes on from something needs besides."""
    own_folder = recipe == "finetune" or recipe.startswith("imagefolder/")
    return (
        ["checkpoint=run"] * ("ftdense" in recipe)
        + ["model.weights=file"] * ("resnet50_gmp" in recipe or "one_shot" in recipe)
        + ["data.root=folder"] * own_folder
    )


def build(overrides: list[str], recipe: str = "quickstart") -> Trainer:
    """The trainer of a recipe with these overrides, in this process."""
    return build_trainer(load_config(recipe, overrides), start())


def run_here(data: Path, run_root: Path, *overrides: str) -> Path:
    """Train in this process and return the run folder."""
    assert main(tiny(data, run_root, *overrides)) == 0
    return newest_run(run_root)


def newest_run(run_root: Path, name: str = "quickstart") -> Path:
    return max((run_root / name).iterdir(), key=lambda path: path.stat().st_mtime)


class StopAfter:
    """Stands in for a signal that arrives during step `step`."""

    def __init__(self, trainer: Any, step: int) -> None:
        self.before_step = trainer.acdc.before_step
        self.trainer, self.step = trainer, step

    def __call__(self) -> None:
        self.before_step()
        if self.trainer.acdc.step == self.step:
            self.trainer.stop_request.number = 15


def fit_and_close(trainer: Any, stop: int | None = None) -> Stopped | None:
    """Train to the end, or until it is stopped during step `stop`: what it says then."""
    stopped = None
    if stop is None:
        trainer.fit()
    else:
        trainer.acdc.before_step = StopAfter(trainer, stop)
        with pytest.raises(Stopped) as caught:
            trainer.fit()
        stopped = caught.value
    trainer.close()
    return stopped


def refusal(*overrides: str, recipe: str = "quickstart") -> str:
    """What a recipe says of overrides that it refuses."""
    with pytest.raises(UserError) as failure:
        load_config(recipe, overrides)
    assert failure.value.exit_code == 2
    return str(failure.value)


def step_folder(run: Path, step: int) -> Path:
    """The checkpoint of that step."""
    return checkpoint.step_folder(run / "checkpoints", step)


def final_state(run: Path, step: int = NUM_STEPS) -> dict[str, Any]:
    return checkpoint.read(step_folder(run, step), checkpoint.STATE)


def records(run: Path, kind: str | None = "epoch") -> list[dict[str, Any]]:
    """What metrics.jsonl holds of one kind; None: of all kinds."""
    found = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record for record in found if kind is None or record["kind"] == kind]


def assert_equal_states(a: Any, b: Any, at: str = "") -> None:
    """Bit for bit, but for the wall clock."""
    assert type(a) is type(b), at
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), at
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), at
        for key in a:
            if key != "seconds":
                assert_equal_states(a[key], b[key], f"{at}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), at
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal_states(x, y, f"{at}[{i}]")
    else:
        assert a == b, at


def command(*arguments: str) -> list[str]:
    """`acdc ...` with this interpreter."""
    return [sys.executable, "-m", "trainer.cli.main", *arguments]


def launcher(*arguments: str, devices: int = 1, module: str = "trainer.train") -> list[str]:
    """`deepspeed --module ...` on a port of its own."""
    options = ["--master_port", str(free_port()), "--num_gpus", str(devices)]
    return [sys.executable, "-m", "deepspeed.launcher.runner", *options, "--module", module, *arguments]


# What a run in this process leaves in the environment: another process would take itself for that rank
OF_A_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")


def environment_of_its_own() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key not in OF_A_RANK}


def wait_for_step(process: subprocess.Popen[str], run_root: Path, step: int) -> None:
    """Return once the metrics of the run that a process trains have come to `step`."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        for file in run_root.glob("*/*/metrics.jsonl"):
            if (lines := file.read_text().splitlines()) and json.loads(lines[-1])["step"] >= step:
                return
        time.sleep(0.02)
    process.kill()
    raise AssertionError(f"the run did not come to step {step}: {process.communicate()[0]}")


def execute(arguments: list[str], timeout: float = 240) -> subprocess.CompletedProcess[str]:
    environment = {**environment_of_its_own(), "COLUMNS": "110"}
    return subprocess.run(
        arguments, capture_output=True, text=True, timeout=timeout, env=environment, check=False
    )
