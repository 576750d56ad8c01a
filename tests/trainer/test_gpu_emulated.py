"""What would make a GPU wait, counted on a CPU: values read from tensors, and calls that synchronise, within
the steps of a whole run. Copies within a device look alike on a CPU: tests/gpu/test_engine.py.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.trainer.distributed.small_net import WHOLE, small
from tests.trainer.runs import build
from trainer.engine import deepspeed_config

pytestmark = pytest.mark.usefixtures("small_net")
READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
METHODS = ("tolist", "cpu", "numpy")


class Reads(TorchDispatchMode):
    """Operators whose result the processor waits for: .item(), bool(), float(), nonzero()."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function in READS:
            self.seen.append(str(function))
        return function(*arguments, **(keywords or {}))


def waits(monkeypatch, data, root, plant=lambda trainer: None, *options):
    """What each step of a run waits for."""
    from deepspeed.accelerator import get_accelerator

    settings = ["sparsity.schedule=(sparse 1, dense 1) x2", "epochs=4", "log.every=100st", *options]
    trainer = build(small(data, root, WHOLE, *settings))
    train_batch, seen = trainer.train_batch, []

    def watched(batches):
        batch = next(batches)
        seen.append([])
        with Reads(seen[-1]), monkeypatch.context() as patch:
            for name in METHODS:
                method = getattr(torch.Tensor, name)
                patch.setattr(
                    torch.Tensor,
                    name,
                    lambda *given, method=method, **named: (
                        seen[-1].append(method.__name__) or method(*given, **named)
                    ),
                )
            patch.setattr(torch.cuda, "synchronize", lambda *_: seen[-1].append("synchronize"))
            patch.setattr(type(get_accelerator()), "synchronize", lambda *_: seen[-1].append("synchronize"))
            return train_batch(iter([batch]))

    trainer.train_batch = watched
    plant(trainer)
    trainer.fit()  # with four phases, evaluations and checkpoints
    trainer.close()
    assert len(seen) == 12
    return seen


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_no_step_waits(precision, stage, monkeypatch, tiny_data, tmp_path):
    if precision == "fp16" and stage:
        pytest.skip("refused by the recipe")
    monkeypatch.setattr("trainer.build.check_precision", lambda *_: None)
    options = [f"engine.precision={precision}", f"engine.zero_stage={stage}"]
    assert waits(monkeypatch, tiny_data, tmp_path, lambda trainer: None, *options) == [[]] * 12


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("optimizer", ["{name: adamw, lr: 0.01}", "{name: rmsprop, lr: 0.001}"])
def test_no_step_of_todays_recipes_waits(optimizer, stage, monkeypatch, tiny_data, tmp_path):
    options = [f"optimizer={optimizer}", f"engine.zero_stage={stage}", "lr={by: step, warmup: 4st}"]
    options += ["mixing={mixup: 0.2, cutmix: 1.0}", "loss.label_smoothing=0.1", "ema.decay=0.9"]
    if stage == 0:
        options += ["optimizer.clip_norm=1.0"]  # at ZeRO-1/2 the norm is read: DeepSpeed's own way
    updates = []

    def watch_updates(trainer):
        update = trainer.averages.update

        def watched():
            updates.append([])
            with Reads(updates[-1]):
                update()

        trainer.averages.update = watched

    assert waits(monkeypatch, tiny_data, tmp_path, watch_updates, *options) == [[]] * 12
    assert updates == [[]] * 12


@pytest.mark.parametrize(
    ("read", "expected"),
    [
        (lambda value: value.item(), "aten._local_scalar_dense.default"),
        (bool, "aten._local_scalar_dense.default"),
        (lambda value: value.tolist(), "tolist"),
        (lambda value: torch.cuda.synchronize(), "synchronize"),
    ],
)
def test_what_waits_is_seen(read, expected, monkeypatch, tiny_data, tmp_path):
    def plant(trainer):
        trainer.engine.module.register_forward_hook(
            lambda module, _, output: read(output[0].detach()) and None if module.training else None
        )

    assert all(expected in step for step in waits(monkeypatch, tiny_data, tmp_path, plant))


def test_deepspeeds_timer_is_seen(monkeypatch, tiny_data, tmp_path):
    def with_timer(*given):
        return {**deepspeed_config(*given), "timers": {"throughput": {"enabled": True}}}

    monkeypatch.setattr("trainer.build.deepspeed_config", with_timer)
    seen = waits(monkeypatch, tiny_data, tmp_path)
    assert any("synchronize" in step for step in seen)
