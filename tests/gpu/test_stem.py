"""The first layers in their other form, on a GPU: the kernel for the gradient of pooling, compiled graphs."""

import shutil

import pytest
import torch
from torch import nn
from torch.nn import functional

from trainer.models import get_model, stem

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 3, 4, 6), (3, 64, 56, 56), (1, 5, 2, 2), (2, 17, 30, 34)])
def test_the_kernel_of_poolings_gradient_is_the_reference(shape, dtype):
    images, channels, height, width = shape
    torch.manual_seed(0)
    input = torch.randn(images, channels, 2 * height, 2 * width, device="cuda", dtype=dtype)
    input = input.relu().contiguous(memory_format=torch.channels_last).requires_grad_()
    grad = torch.randn(shape, device="cuda", dtype=dtype).contiguous(memory_format=torch.channels_last)
    output = stem.max_pool(input)
    assert torch.equal(output, functional.max_pool2d(input, 3, 2, 1))
    (ours,) = torch.autograd.grad(output, input, grad)
    (theirs,) = torch.autograd.grad(
        (functional.max_pool2d(input.float(), 3, 2, 1) * grad.float()).sum(), input
    )
    assert ours.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(ours, theirs)


def test_a_compiled_stem_has_the_same_output_and_gradients():
    if not any(map(shutil.which, ("gcc", "cc", "clang"))):
        pytest.skip("torch.compile needs a C compiler")
    torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    whole = get_model("resnet18", num_classes=10)
    model = nn.Sequential(whole.conv1, whole.bn1, whole.relu, whole.maxpool)
    model = model.cuda().to(memory_format=torch.channels_last)
    images = torch.randn(8, 3, 64, 64, device="cuda").contiguous(memory_format=torch.channels_last)
    found = {}
    for backend in ("inductor", stem.inductor):
        torch._dynamo.reset()
        model.zero_grad()
        output = torch.compile(model, backend=backend, dynamic=False)(images)
        output.square().mean().backward()
        found[backend] = [output, *(parameter.grad.clone() for parameter in model.parameters())]
    for ours, theirs in zip(found[stem.inductor], found["inductor"], strict=True):
        error = (ours - theirs).norm() / theirs.norm()
        assert error < 1e-4
