"""cuSPARSELt behind acdc::mm24, against dense products."""

import copy
import time
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional

from sparsity import NM, Run24, Transposable24, mask_layers
from sparsity.kernels.measure import TOLERANCE, median_seconds, relative_error
from sparsity.kernels.semi_structured.family import Family24, Shape
from sparsity.kernels.semi_structured.inference import pack_layers, packable
from sparsity.kernels.semi_structured.kernel import Tuning, kernel24
from sparsity.kernels.semi_structured.operator import DTYPES, compress24, conv24, matmul24, missing, mm24
from sparsity.kernels.semi_structured.search import DEFAULT, Algorithm, algorithms, fastest, name_of, place

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


CHECKS = ("test_schema", "test_faketensor")
ALGORITHMS = [list(DEFAULT), list(DEFAULT)]


@pytest.mark.parametrize("algorithms", [[], ALGORITHMS])
def test_the_operators_are_sound(algorithms):
    """The fake ones among them, whose strides compiled code goes by."""
    rows, weight = operands(64, 64, 64, torch.bfloat16, NM(2, 4))
    checks = torch.library.opcheck(mm24, (rows, weight, False, *algorithms), test_utils=CHECKS)
    assert set(checks.values()) == {"SUCCESS"}
    weight = weight.detach()[:, :, None, None].requires_grad_()
    for stride, size in (((1, 1), 4), ((2, 2), 7)):
        images = torch.randn(4, 64, size, size, device=CUDA, dtype=torch.bfloat16)
        images = images.to(memory_format=torch.channels_last).requires_grad_()
        arguments = (images, weight, stride, False, *algorithms)
        checks = torch.library.opcheck(conv24, arguments, test_utils=CHECKS)
        assert set(checks.values()) == {"SUCCESS"}


def test_weights_compressed_once():
    rows, weight = operands(128, 256, 64, torch.bfloat16, NM(2, 4))
    assert_close(matmul24(rows, compress24(weight), 256), functional.linear(rows, weight))


def test_nothing_is_searched_in_fp16():
    rows, weight = (each.detach() for each in operands(1568, 512, 2048, torch.float16, NM(2, 4)))
    assert algorithms(rows, compress24(weight)) == [DEFAULT]


@pytest.mark.parametrize("shape", [(12544, 512, 128), (1568, 512, 2048)])
def test_every_algorithm_that_the_library_names_is_tried(shape):
    """What is accepted is right, once more; numbers that there are not are refused, and not by a crash."""
    rows, weight = (each.detach() for each in operands(*shape, torch.bfloat16, NM(2, 4)))
    compressed, expected = compress24(weight), functional.linear(rows, weight)
    named = algorithms(rows, compressed)
    assert named[0] == DEFAULT
    assert len(named) > 1, "the library's own search gave no answer"
    product = partial(matmul24, rows, compressed, len(weight))
    beyond = Algorithm(10**6)
    best, seconds = fastest(product, expected, [*named, beyond])
    assert seconds[DEFAULT] is not None
    assert seconds[beyond] is None
    assert seconds[best] == min(time for time in seconds.values() if time) or best == DEFAULT
    for algorithm, found in seconds.items():
        if found is not None:
            assert relative_error(product(algorithm), expected.float()) <= TOLERANCE, algorithm
    wrong = [str(algorithm) for algorithm, found in seconds.items() if found is None]
    print(f"{shape}: {len(seconds)} tried, refused {wrong}, best {best}")


def test_a_wrong_algorithm_is_refused():
    """Also one that leaves the memory of its result as it was, where the right result may lie."""
    rows, weight = (each.detach() for each in operands(1024, 256, 64, torch.bfloat16, NM(2, 4)))
    compressed, expected = compress24(weight), functional.linear(rows, weight)

    def product(algorithm):
        if algorithm.number == 1:
            return torch.empty_like(expected)
        return matmul24(rows, compressed, 256) * (1.05 if algorithm.number == 2 else 1)

    best, seconds = fastest(product, expected, [DEFAULT, Algorithm(1), Algorithm(2)])
    assert best == DEFAULT
    assert seconds[Algorithm(1)] is seconds[Algorithm(2)] is None


def masked(layer, kernel):
    net = nn.Sequential(layer).to(CUDA).to(memory_format=torch.channels_last)
    (layer,) = mask_layers(net).values()
    layer.mask.copy_(Transposable24()({"w": layer.weight})["w"])
    layer.kernel = kernel
    return net


def step(net, call, images):
    images = images.detach().requires_grad_()
    with torch.autocast("cuda", torch.bfloat16):
        output = call(images)
    (output.float() * torch.linspace(-1, 1, output.numel(), device=CUDA).view(output.shape)).sum().backward()
    gradients = [parameter.grad.clone() for parameter in net.parameters()]
    net.zero_grad()
    return output, images.grad, *gradients


@pytest.mark.parametrize("tuned", [False, True])
@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (nn.Linear(256, 512), (16, 64, 256)),
        (nn.Conv2d(256, 512, 1), (16, 256, 14, 14)),
        (nn.Conv2d(256, 512, 1, 2, bias=False), (16, 256, 15, 15)),
    ],
)
def test_a_compiled_layer_is_the_eager_one_and_the_dense_one(layer, size, tuned):
    torch._dynamo.reset()
    torch.manual_seed(0)
    rows = 16 * 64 if len(size) == 3 else 16 * (14 if layer.stride[0] == 1 else 8) ** 2
    tuning = Tuning(place(), name_of(torch.bfloat16), rows, DEFAULT, DEFAULT)
    net = masked(copy.deepcopy(layer), kernel24(True, tuning if tuned else None))
    images = torch.randn(size, device=CUDA)
    if len(size) == 4:
        images = images.to(memory_format=torch.channels_last)
    eager = step(net, net, images)
    compiled = step(net, torch.compile(net, dynamic=False, fullgraph=True), images)
    net[0].kernel = None
    dense = step(net, net, images)
    assert eager[0].dtype == compiled[0].dtype == torch.bfloat16
    assert compiled[0].stride() == eager[0].stride() == dense[0].stride()
    for a, b, c in zip(eager, compiled, dense, strict=True):
        assert_close(a, c)
        assert_close(b, c)


def test_compressed_layers_in_inference():
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(64, 128, 1), nn.ReLU(), nn.Conv2d(128, 64, 1, 2), nn.Flatten(2), nn.Linear(16, 64)
    )
    for index in (0, 2, 4):
        net[index].weight.data *= NM(2, 4)({"w": net[index].weight})["w"]
    net = net.eval().to(CUDA, torch.bfloat16).to(memory_format=torch.channels_last)
    assert packable(net) == ["0", "2", "4"]
    packed = copy.deepcopy(net)
    pack_layers(packed, packable(net), torch.bfloat16)
    images = torch.randn(8, 64, 8, 8, device=CUDA, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = net(images)
        assert_close(packed(images), expected)
        assert_close(torch.compile(packed, dynamic=False, fullgraph=True)(images), expected)


def test_what_launching_costs_the_host_is_not_counted():
    numbers = torch.zeros(1000, device=CUDA)

    def call():
        time.sleep(1e-3)
        return numbers.add_(1)

    assert median_seconds(call, CUDA) < 5e-4


def test_tuning_measures_right_kernels():
    tuned = Family24(CUDA, torch.bfloat16, transposable=True).measure(Shape(4096, 1024, 4096))
    assert tuned.forward.right, tuned
    assert tuned.gradient.right, tuned
    assert Family24.choose(tuned, required=True).title == Run24.TRANSPOSED.title


@pytest.mark.parametrize("stride", [1, 2])
def test_tuning_measures_convolutions(stride):
    shape = Shape(16 * 49, 512, 1024, 7 * stride, 7 * stride, stride, stride)
    tuned = Family24(CUDA, torch.bfloat16, transposable=True).measure(shape)
    assert tuned.forward.right, tuned
    assert tuned.gradient.right, tuned
