"""Which precision a live engine computes in, layer by layer, and that everything kept stays float32."""

import pytest
import torch
from torch import nn

from sparsity.masters import masters_of
from tests.trainer.distributed.small_net import small
from trainer.build import build_trainer
from trainer.config.load import load_config
from trainer.distributed.ranks import start

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
pytest.importorskip("nvidia.dali", reason="DALI is not installed")
pytestmark = pytest.mark.usefixtures("small_net")


@pytest.mark.parametrize(
    ("precision", "stage", "expected"),
    [
        ("bf16", 0, torch.bfloat16),
        ("bf16", 1, torch.bfloat16),
        ("fp32", 0, torch.float32),
        ("auto", 0, torch.float32),  # of a CPU
    ],
)
def test_products_are_in_the_recipes_precision_and_all_else_in_float32(
    precision, stage, expected, tiny_data, tmp_path
):
    """In training, in evaluation, and where BatchNorm statistics are taken anew."""
    options = [f"engine.precision={precision}", f"engine.zero_stage={stage}", "data.batch_size=8"]
    options += ["steps_per_epoch=1", "data.eval_batch_size=150"]
    options += ["sparsity.recompute_batch_norm=1st"]
    overrides = small(tiny_data, tmp_path, "{norm: true}", *options)
    trainer = build_trainer(load_config("quickstart", overrides), start())
    products, losses, gradients = [], [], []
    for layer in trainer.engine.module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(lambda *call: products.append((call[0].training, call[-1].dtype)))
    trainer.engine.module.register_forward_hook(lambda *call: losses.append(call[-1][0].dtype))
    sgd = trainer.engine.optimizer.optimizer if stage else trainer.engine.optimizer
    sgd.register_step_pre_hook(
        lambda *_: gradients.extend(p.grad.dtype for p in sgd.param_groups[0]["params"])
    )
    trainer.fit()
    trainer.close()
    layers = 3
    calls = {training: [dtype for t, dtype in products if t is training] for training in (True, False)}
    assert calls == {True: [expected] * layers * (2 + 1), False: [expected] * layers * 2}
    assert losses == [torch.float32] * 4
    assert set(gradients) == {torch.float32}
    masters = masters_of(trainer.engine)
    for parameter in trainer.engine.module.parameters():
        assert parameter.dtype == masters.weight(parameter).dtype == torch.float32
        assert [value.dtype for value in masters.state(parameter).values()] == [torch.float32]
    for name, buffer in trainer.engine.module.named_buffers():
        if not name.endswith(("mask", "num_batches_tracked")):
            assert buffer.dtype == torch.float32, name
