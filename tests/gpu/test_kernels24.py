"""cuSPARSELt behind acdc::mm24, against dense products."""

import pytest
import torch
from torch.nn import functional

from sparsity import NM, Run24, Transposable24
from sparsity.kernels.measure import TOLERANCE
from sparsity.kernels.semi_structured.family import Family24, Shape
from sparsity.kernels.semi_structured.operator import DTYPES, compress24, matmul24, missing, mm24

CUDA = torch.device("cuda")
_missing = missing(CUDA) if torch.cuda.is_available() else "a GPU"
pytestmark = pytest.mark.skipif(_missing is not None, reason=f"2:4 kernels need {_missing}")


def operands(rows, outputs, inputs, dtype, pattern):
    torch.manual_seed(0)
    weight = torch.randn(outputs, inputs, device=CUDA)
    weight = (weight * pattern({"w": weight})["w"]).to(dtype)
    return torch.randn(rows, inputs, device=CUDA).to(dtype).requires_grad_(), weight.requires_grad_()


def assert_close(found, expected):
    assert (found.float() - expected.float()).abs().max() <= TOLERANCE * expected.float().abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(64, 64, 64), (3136 * 8, 256, 64), (392, 2048, 512), (1024, 1000 // 8 * 16, 768)]
)
@pytest.mark.parametrize("transposed", [False, True])
def test_forward_and_gradients(dtype, shape, transposed):
    rows, weight = operands(*shape, dtype, Transposable24() if transposed else NM(2, 4))
    grad = torch.randn(shape[0], shape[1], device=CUDA).to(dtype)
    expected = functional.linear(rows, weight)
    found = mm24(rows, weight, transposed)
    assert_close(found, expected)
    for a, b in zip(
        torch.autograd.grad(found, (rows, weight), grad),
        torch.autograd.grad(expected, (rows, weight), grad),
        strict=True,
    ):
        assert_close(a, b)


def test_the_operator_is_sound():
    rows, weight = operands(64, 64, 64, torch.bfloat16, NM(2, 4))
    checks = torch.library.opcheck(mm24, (rows, weight, False), test_utils=("test_schema", "test_faketensor"))
    assert set(checks.values()) == {"SUCCESS"}


def test_weights_compressed_once():
    rows, weight = operands(128, 256, 64, torch.bfloat16, NM(2, 4))
    assert_close(matmul24(rows, compress24(weight), 256), functional.linear(rows, weight))


def test_tuning_measures_right_kernels():
    tuned = Family24(CUDA, torch.bfloat16, transposable=True).measure(Shape(4096, 1024, 4096))
    assert tuned.forward.right, tuned
    assert tuned.gradient.right, tuned
    assert Family24.choose(tuned, required=True) is Run24.TRANSPOSED
