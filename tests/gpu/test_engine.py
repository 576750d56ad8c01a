"""The engine as a run builds it, on a GPU: waiting, precision, resuming."""

import shutil
import sys

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)
pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")

from tests.trainer.runs import assert_equal_states, build, execute, final_state, newest_run
from trainer.engine import num_graphs

STEPS = 5


def options(root, *overrides):
    """Three epochs of five steps: a dense one, two compressed ones."""
    return [
        f"run_root={root}",
        "epochs=3",
        f"steps_per_epoch={STEPS}",
        "sparsity.schedule=dense 1, sparse 1, dense 1",
        "log.every=1000st",
        "save.every=3ep",
        *overrides,
    ]


@pytest.fixture
def made(tmp_path):
    trainers = []

    def make(*overrides):
        torch._dynamo.reset()  # else graphs of the tests before count against the limit of recompilations
        trainers.append(build(options(tmp_path, *overrides)))
        return trainers[-1]

    yield make
    for trainer in trainers:
        trainer.close()


def watch(trainer):
    """Raise an error where a step waits for the device. Returns a list that grows by one a step."""
    train_batch, seen = trainer.train_batch, []

    def watched(batches):
        if len(seen) > 1:  # the first steps compile and measure algorithms
            batch = next(batches)
            torch.cuda.set_sync_debug_mode("error")
            batches = iter([batch])
        try:
            return train_batch(batches)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            seen.append(1)

    trainer.train_batch = watched
    return seen


@pytest.mark.parametrize("precision", ["bf16", "fp16", "tf32", "fp32"])
@pytest.mark.parametrize(("stage", "compiled"), [(0, True), (0, False), (1, False)])
def test_no_step_of_a_run_waits_for_the_device(precision, stage, compiled, made):
    if precision == "fp16" and stage:
        pytest.skip("refused by the recipe")
    if compiled and not any(map(shutil.which, ("gcc", "cc", "clang"))):
        pytest.skip("torch.compile needs a C compiler")
    trainer = made(
        f"engine.precision={precision}", f"engine.zero_stage={stage}", f"engine.compile={compiled}"
    )
    seen = watch(trainer)
    trainer.fit()
    assert len(seen) == 3 * STEPS
    if compiled:
        assert num_graphs() - trainer.graphs_before == 2


@pytest.mark.parametrize("optimizer", ["{name: adamw, lr: 0.001}", "{name: rmsprop, lr: 0.001}"])
@pytest.mark.parametrize(("stage", "compiled"), [(0, True), (0, False), (1, False)])
def test_no_step_of_todays_recipes_waits_for_the_device(optimizer, stage, compiled, made):
    if compiled and not any(map(shutil.which, ("gcc", "cc", "clang"))):
        pytest.skip("torch.compile needs a C compiler")
    options = [f"optimizer={optimizer}", f"engine.zero_stage={stage}", f"engine.compile={compiled}"]
    options += ["lr={by: step, warmup: 4st}", "ema.decay=0.9", "loss.label_smoothing=0.1"]
    options += ["mixing={mixup: 0.2, cutmix: 1.0}"]
    if stage == 0:
        options += ["optimizer.clip_norm=1.0"]  # at ZeRO-1/2 DeepSpeed reads the norm
    trainer = made(*options)
    seen = watch(trainer)
    trainer.fit()
    assert len(seen) == 3 * STEPS
    if compiled:
        assert num_graphs() - trainer.graphs_before == 2


@pytest.mark.parametrize(("precision", "largest"), [("fp32", 1e-5), ("tf32", 1e-2)])
def test_products_are_as_exact_as_the_recipe_says(precision, largest, made):
    """Convolution and matrix product over 1,152 terms, against float64; TF32 keeps 10 bits."""
    made(f"engine.precision={precision}")
    torch.manual_seed(0)
    images, weights = torch.randn(8, 128, 28, 28, device="cuda"), torch.randn(128, 128, 3, 3, device="cuda")
    rows = weights.flatten(1)
    for found, exact in (
        (
            torch.conv2d(images, weights, padding=1),
            torch.conv2d(images.double(), weights.double(), padding=1),
        ),
        (rows @ rows.t(), rows.double() @ rows.double().t()),
    ):
        error = ((found - exact).abs().max() / exact.abs().max()).item()
        assert error < largest
        assert precision == "fp32" or error > 1e-5


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_resumed_run_has_the_same_bits_with_deterministic_convolutions(precision, tmp_path):
    """Each part in a process of its own, as after an interruption. resnet20 has no pooling."""

    def train(name, *overrides):
        recipe = options(tmp_path / name, f"engine.precision={precision}", "engine.cudnn_benchmark=false")
        recipe += ["model.name=resnet20", "model.arguments={}", "save.every=2st", "save.keep=9", *overrides]
        command = [sys.executable, "-m", "trainer.train", "quickstart", *recipe]
        done = execute(command)
        assert done.returncode == 0, done.stderr[-3000:]
        return newest_run(tmp_path / name)

    whole = train("whole")
    copy = shutil.copytree(whole, tmp_path / "again" / "quickstart" / whole.name)
    again = train("again", f"resume={copy}/checkpoints/step-{6:09}")
    assert_equal_states(*(final_state(run, 3 * STEPS) for run in (whole, again)))


def test_skipped_steps_are_counted_and_the_scale_falls(made):
    trainer = made("engine.precision=fp16")
    scaler = trainer.engine.torch_autocast_z0_gradscaler
    scaler.load_state_dict({**scaler.state_dict(), "scale": 2.0**60})
    before = {name: value.clone() for name, value in trainer.acdc.weights().items()}
    trainer.acdc.before_step()
    trainer.train_batch(trainer.loaders.train.epoch(0, 0))
    assert trainer.engine.loss_scaling.read() == {"loss_scale": 2.0**59, "skipped_steps": 1}
    assert all(torch.equal(value, before[name]) for name, value in trainer.acdc.weights().items())
