"""Under the launcher, on every rank: runs of SmallNet one after the other, each observed on this rank.

deepspeed --num_gpus 2 --module tests.trainer.distributed.rank_results RUNS OUT

RUNS: a JSON file, {name: [key=value, ...]}. OUT/<name>-rank<N>.pt is what rank N saw of a run.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.invariants import launcher_arguments
from sparsity.guard import MaskError, check_equal_on_all_ranks
from tests.trainer.distributed.small_net import SmallNet, buffers
from trainer import build
from trainer.config.load import load_config
from trainer.distributed import ranks
from trainer.loop import Trainer
from trainer.models import MODELS


def observe(trainer: Trainer) -> dict[str, Any]:
    """Train to the end. Returns, of this rank: "drawn", of each step the elements of the first image that
    dropout dropped; "own", of each epoch the BatchNorm statistics at its last step; "last", those at the end
    of the run; "weights", at the end of the run."""
    drawn: list[torch.Tensor] = []
    own: list[dict[str, torch.Tensor]] = []
    train_epoch, model = trainer.train_epoch, trainer.acdc.model

    def record_dropped(layer: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        if layer.training:
            with torch.random.fork_rng(devices=[]):  # the same numbers as the pass itself is about to draw
                drawn.append(layer.forward(torch.ones_like(inputs[0]))[0] == 0)

    def epoch_and_statistics(epoch: int) -> Any:
        trained = train_epoch(epoch)
        own.append(statistics(model))
        return trained

    model.dropout.register_forward_pre_hook(record_dropped)
    trainer.train_epoch = epoch_and_statistics  # type: ignore[method-assign]
    trainer.fit()
    trainer.close()
    weights = {name: value.detach().clone() for name, value in model.named_parameters()}
    return {"drawn": drawn, "own": own, "last": statistics(model), "weights": weights}


@contextlib.contextmanager
def precision_of(run: str) -> Iterator[None]:
    """Runs named fp16... train in fp16, which a CPU may not, with a first scale that overflows for a few
    steps."""
    scaler = torch.amp.GradScaler
    with pytest.MonkeyPatch.context() as patch:
        if run.startswith("fp16"):
            patch.setattr(build, "check_precision", lambda *_: None)
            patch.setattr(torch.amp, "GradScaler", lambda device: scaler(device, init_scale=2.0**21))
        yield


def statistics(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer for name, buffer in buffers(model).items() if "running" in name}


def main(runs: Path, out: Path) -> None:
    MODELS["small"] = SmallNet
    device = ranks.start()
    for name, overrides in json.loads(runs.read_text()).items():
        with precision_of(name):
            seen = observe(build.build_trainer(load_config("quickstart", overrides), device))
        torch.save(seen, out / f"{name}-rank{ranks.rank()}.pt")
    with pytest.raises(MaskError) as failure:
        check_equal_on_all_ranks({"same": torch.ones(4) > 0, "other": torch.arange(4) == ranks.rank()})
    (out / f"masks-rank{ranks.rank()}.json").write_text(json.dumps(failure.value.layers))


if __name__ == "__main__":
    main(*map(Path, launcher_arguments()))
