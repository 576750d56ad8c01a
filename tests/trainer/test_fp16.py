"""fp16 with loss scaling, on a CPU that is allowed to for these tests."""

import json
import logging

import pytest
import torch

from sparsity import num_leaked
from tests.trainer.distributed.small_net import WHOLE, small
from tests.trainer.runs import assert_equal_states, build, final_state, fit_and_close, newest_run, records
from trainer import engine
from trainer.config.load import load_config
from trainer.errors import UserError
from trainer.train import main

pytestmark = pytest.mark.usefixtures("small_net")


@pytest.fixture(autouse=True)
def cpu_may(monkeypatch):
    monkeypatch.setattr("trainer.build.check_precision", lambda *_: None)
    # Set by an engine in fp16, it would scale the losses of every later engine of this process
    torch_autocast = pytest.importorskip("deepspeed.runtime.torch_autocast")
    for name in ("TORCH_AUTOCAST_INITIALIZED", "TORCH_AUTOCAST_DTYPE"):
        monkeypatch.setattr(torch_autocast, name, getattr(torch_autocast, name))


@pytest.fixture
def quick_scale(monkeypatch):
    """A scale that overflows in the first steps, and doubles after every second step that does not."""
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(
        torch.amp, "GradScaler", lambda device: scaler(device, init_scale=2.0**17, growth_interval=2)
    )


def fp16(data, root, *overrides):
    return small(data, root, WHOLE, "engine.precision=fp16", *overrides)


def test_layers_compute_in_fp16_and_weights_stay_float32(tiny_data, tmp_path):
    trainer = build(fp16(tiny_data, tmp_path))
    seen = []
    trainer.acdc.model.conv2.register_forward_hook(lambda *call: seen.append(call[-1].dtype))
    trainer.fit()
    trainer.close()
    assert set(seen) == {torch.float16}
    assert {parameter.dtype for parameter in trainer.engine.module.parameters()} == {torch.float32}
    manifest = newest_run(tmp_path) / "checkpoints" / "sparse" / "manifest.json"
    assert json.loads(manifest.read_text())["info"]["precision"] == "fp16"


def test_a_step_that_overflows_changes_nothing_and_halves_the_scale(tiny_data, tmp_path):
    """Also the very first, and the first of a compressed phase."""
    trainer = build(fp16(tiny_data, tmp_path))
    acdc, sgd = trainer.acdc, trainer.engine.optimizer
    scaler = trainer.engine.torch_autocast_z0_gradscaler
    scales = {1: 2.0**60, 2: 2.0**8, 4: 2.0**60, 5: 2.0**8}  # at the beginning of steps
    before, skipped = [], []

    def state():
        momenta = [sgd.state[parameter]["momentum_buffer"] for parameter in acdc.model.parameters()]
        return [value.detach().clone() for value in (*acdc.model.parameters(), *momenta)]

    def set_scale(*_):
        if acdc.model.training and acdc.step in scales:
            scaler.load_state_dict({**scaler.state_dict(), "scale": scales[acdc.step]})

    def compare(*_):
        skipped.append(all(map(torch.equal, before.pop(), state())))
        assert num_leaked(acdc.weights(), acdc.masks()) == 0
        if len(skipped) == 1:
            assert not any(sgd.state[parameter]["momentum_buffer"].any() for parameter in sgd.state)

    acdc.model.register_forward_pre_hook(set_scale)
    sgd.register_step_pre_hook(lambda *_: before.append(state()))
    sgd.register_step_post_hook(compare)
    trainer.fit()
    trainer.close()
    assert skipped == [True, False, False, True, False, False]
    assert all(value.isfinite().all() for value in state())
    for name, mask in acdc.masks().items():
        assert not sgd.state[acdc.model.get_submodule(name).weight]["momentum_buffer"][~mask].any()
    steps, epochs = (records(newest_run(tmp_path), kind) for kind in ("step", "epoch"))
    assert [record["skipped_steps"] for record in epochs] == [1, 2]
    assert [record["step"] for record in steps] == [1, 2, 4, 5]
    assert [record["loss_scale"] for record in steps] == [2.0**59, 2.0**8, 2.0**59, 2.0**8]


@pytest.mark.usefixtures("quick_scale")
def test_a_resumed_run_has_the_scale_and_the_same_bits(tiny_data, tmp_path):
    def options(name):
        return fp16(tiny_data, tmp_path / name)

    for name, stop in (("whole", None), ("stopped", 2), ("later", 5)):
        trainer = build(options(name))
        fit_and_close(trainer, stop)
    whole = final_state(newest_run(tmp_path / "whole"), 6)
    assert 0 < whole["loss_scaling"]["skipped"] < 6
    for name in ("stopped", "later"):
        resumed = build([*options(name), "resume=auto"])
        assert resumed.engine.loss_scaling.state_dict() != whole["loss_scaling"]
        resumed.fit()
        resumed.close()
        assert_equal_states(whole, final_state(newest_run(tmp_path / name), 6))
        rates = ("images_per_second", "data_wait", "seconds")
        a, b = (
            [
                {k: v for k, v in record.items() if k not in rates}
                for record in records(newest_run(tmp_path / run), "step")
            ]
            for run in ("whole", name)
        )
        assert a == b


def test_adamw_skips_steps_too_and_does_not_count_them(tiny_data, tmp_path):
    options = fp16(tiny_data, tmp_path, "optimizer={name: adamw, lr: 0.01}")
    trainer = build(options)
    adamw, scaler = trainer.engine.optimizer, trainer.engine.torch_autocast_z0_gradscaler
    weight = trainer.acdc.model.conv2.weight
    before, skipped = [], []

    def overflow(*_):
        if trainer.acdc.model.training and trainer.acdc.step in (1, 4):
            scaler.load_state_dict({**scaler.state_dict(), "scale": 2.0**60})
        elif trainer.acdc.model.training:
            scaler.load_state_dict({**scaler.state_dict(), "scale": 2.0**8})

    trainer.acdc.model.register_forward_pre_hook(overflow)
    adamw.register_step_pre_hook(lambda *_: before.append(weight.detach().clone()))
    adamw.register_step_post_hook(lambda *_: skipped.append(torch.equal(before[-1], weight)))
    trainer.fit()
    trainer.close()
    assert skipped == [True, False, False, True, False, False]
    state = final_state(newest_run(tmp_path), 6)
    assert (state["optimizer_steps"], state["loss_scaling"]["skipped"]) == (4, 2)


def test_momentum_from_zero_takes_the_same_first_step_as_none():
    torch.manual_seed(0)
    start, gradient = torch.randn(1000), torch.randn(1000)
    ends = []
    for momentum in (None, torch.zeros(1000)):
        weight = torch.nn.Parameter(start.clone())
        sgd = torch.optim.SGD([weight], lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3, fused=True)
        if momentum is not None:
            sgd.state[weight]["momentum_buffer"] = momentum
        weight.grad = gradient.clone()
        sgd.step()
        ends.append((weight.detach(), sgd.state[weight]["momentum_buffer"]))
    assert all(map(torch.equal, *ends))


def test_another_precision_has_no_scale_and_fp16_goes_on_from_it(tiny_data, tmp_path):
    assert main(["quickstart", *small(tiny_data, tmp_path, WHOLE, "save.every=1st", "save.keep=9")]) == 0
    run = newest_run(tmp_path)
    assert "loss_scale" not in records(run, "step")[0]
    assert "loss_scaling" not in final_state(run, 6)
    point = run / "checkpoints" / "step-000000004"
    assert main(["quickstart", *fp16(tiny_data, tmp_path), f"resume={point}"]) == 0
    assert records(newest_run(tmp_path), "step")[-1]["loss_scale"] > 1


def test_a_run_without_momentum_so_far_may_skip_its_first_step_with_some(tiny_data, tmp_path):
    settings = ["optimizer.momentum=0", "optimizer.nesterov=false", "save.every=1st", "save.keep=9"]
    assert main(["quickstart", *small(tiny_data, tmp_path, WHOLE, *settings)]) == 0
    point = newest_run(tmp_path) / "checkpoints" / "step-000000004"
    options = fp16(tiny_data, tmp_path, "optimizer.momentum=0.9", f"resume={point}")
    trainer = build(options)
    trainer.close()
    sgd = trainer.engine.optimizer
    for parameter in trainer.acdc.model.parameters():  # torch would leave it uninitialised
        assert not sgd.state[parameter]["momentum_buffer"].any()


def test_fp16_is_refused_at_zero_stages_that_would_skip_apart():
    with pytest.raises(UserError, match="precision fp16 needs zero_stage 0, not 1"):
        load_config("quickstart", ["engine.precision=fp16", "engine.zero_stage=1"])


def test_a_gpu_without_bf16_is_told_of_fp16(caplog):
    """As is true of the GPU that this machine lacks."""
    for precision, count in (("auto", 1), ("bf16", 1), ("fp16", 0), ("fp32", 0)):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            config = load_config("quickstart", [f"engine.precision={precision}"])
            engine.check_precision(config.engine, torch.device("cuda"))
        assert sum("engine.precision=fp16 is faster here" in line for line in caplog.messages) == count
