"""A training step on a GPU: no waiting for the device, channels_last kept, phases switched in place."""

import shutil

import pytest
import torch

from sparsity import ACDC, NM, GlobalMagnitude, PhaseSchedule
from trainer.models import get_model
from trainer.models.classifier import Classifier

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
STEPS = 3


class Run:
    """A small AC/DC run of plain PyTorch over one batch."""

    def __init__(self, pattern, phases="dense 1, (sparse 1, dense 1) x2"):
        torch.manual_seed(0)
        model = get_model("resnet18", num_classes=10)
        self.acdc = ACDC(model, pattern, PhaseSchedule.parse(phases), STEPS, exclude=["conv1", "fc"])
        self.module = Classifier(model, (0.5,) * 3, (0.2,) * 3).cuda().to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(self.module.parameters(), 0.1, 0.9, fused=True)
        self.acdc.attach(self.optimizer)
        images = torch.randint(0, 256, (32, 64, 64, 3), dtype=torch.uint8, device="cuda")
        self.batch = images.permute(0, 3, 1, 2), torch.randint(0, 10, (32,), device="cuda")
        self.totals = torch.zeros(4, dtype=torch.float64, device="cuda")

    def backward(self):
        with torch.autocast("cuda", torch.bfloat16):
            loss, counts = self.module(*self.batch)
        loss.backward()
        self.totals += counts

    def step(self):
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


@pytest.mark.parametrize("compiled", [False, True])
def test_no_step_waits_for_the_device(compiled):
    run = Run(GlobalMagnitude(0.9))
    if compiled:
        if not any(map(shutil.which, ("gcc", "cc", "clang"))):
            pytest.skip("torch.compile needs a C compiler")
        torch._dynamo.reset()
        run.module.compile(dynamic=False)
    run.acdc.before_step()
    run.step()  # compiles, and fills the optimizer's state
    try:
        for _ in range(5 * STEPS - 1):
            torch.cuda.set_sync_debug_mode("default")
            run.acdc.before_step()  # at a phase switch the threshold is read once
            torch.cuda.set_sync_debug_mode("error")
            run.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert run.totals[3].item() == 32 * 5 * STEPS


def test_channels_last_is_kept_through_forward_and_backward():
    run = Run(NM(2, 4))
    run.acdc.before_step()
    run.backward()
    for parameter in run.module.parameters():
        if parameter.dim() == 4:
            assert parameter.is_contiguous(memory_format=torch.channels_last)
            assert parameter.grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_masks_are_those_of_a_cpu(sparsity):
    torch.manual_seed(0)
    weights = {str(i): torch.randn(64, 64, 3, 3) for i in range(4)}
    weights["ties"] = torch.randn(100, 100).mul(4).round().div(4)
    on_cpu = GlobalMagnitude(sparsity)(weights)
    on_gpu = GlobalMagnitude(sparsity)({name: weight.cuda() for name, weight in weights.items()})
    assert all(torch.equal(mask, on_gpu[name].cpu()) for name, mask in on_cpu.items())


def test_nothing_leaks_on_a_gpu():
    run = Run(GlobalMagnitude(0.9), "dense 1, sparse 2")
    for _ in range(3 * STEPS):
        run.acdc.before_step()
        run.step()
    for name, mask in run.acdc.masks().items():
        assert not run.acdc.weights()[name][~mask].any()
