"""Sparse CPU kernels against conv2d and autograd over masked weights; plans, formats, and the operators'
rules."""

import copy
import pickle
import random
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional

from sparsity import MaskedConv2d, mask_layers
from sparsity.execution import kernel_named
from sparsity.flops import Call
from sparsity.kernels.choose import choose_kernels
from sparsity.kernels.interface import KernelUnavailableError
from sparsity.kernels.unstructured import family, library, operator
from sparsity.kernels.unstructured.family import GRIDS, Shape, SparseFamily, candidates
from sparsity.kernels.unstructured.frozen import SIZES, FrozenKernel, FrozenPlan
from sparsity.kernels.unstructured.kernel import SparseKernel
from sparsity.kernels.unstructured.plan import Convolution, Plan, Tile, Tiles

needs_compiler = pytest.mark.skipif(library.find_compiler() is None, reason="no C++ compiler")
pytestmark = needs_compiler

FP32, BF16 = torch.float32, torch.bfloat16
TILES = GRIDS[library.vector_bytes()]


def drawn(seed):
    """A convolution, sizes, a density and a tile, anything that may be asked for."""
    draw = random.Random(seed)
    kernel = draw.choice([(1, 1), (3, 3), (1, 3), (3, 1), (5, 5), (2, 2), (7, 7)])
    stride = draw.choice([(1, 1), (2, 2), (1, 2), (3, 2)])
    padding = (draw.randint(0, kernel[0] // 2), draw.randint(0, kernel[1] // 2))
    dilation, groups = draw.choice([(1, 1), (1, 1), (2, 1)]), draw.choice([1, 1, 1, 2, 4])
    height, width = (draw.randint(1, 15) + d * (k - 1) for d, k in zip(dilation, kernel, strict=True))
    rows, run = draw.choice(TILES)
    units = draw.choice([number for number in (1, 2, 4) if run % number == 0])
    return {
        "convolution": Convolution(kernel, stride, padding, dilation, groups),
        "channels": (4 * draw.randint(1, 8), 4 * draw.randint(1, 8)),
        "size": (height, width),
        "images": draw.choice([1, 2, 7, 16, 31, 32, 33, 64, 65]),
        "density": draw.choice([0, 0.02, 0.1, 0.5, 1]),
        "tile": Tile(rows, run // units, units, draw.choice([100, 3000, 40000])),
        "dtype": draw.choice([FP32, BF16]),
        "format": draw.choice([torch.channels_last, torch.contiguous_format]),
    }


class Case:
    """Operands of a layer, its plan, and what conv2d and autograd give in float32 over the same rounded
    values."""

    def __init__(self, seed, **given):
        case = {**drawn(seed), **given}
        random_ = torch.Generator().manual_seed(seed)
        self.convolution, self.dtype = case["convolution"], case["dtype"]
        inputs, outputs = case["channels"]
        size = (outputs, inputs // self.convolution.groups, *self.convolution.kernel)
        self.mask = torch.rand(size, generator=random_) < case["density"]
        self.weight = (torch.randn(size, generator=random_) * self.mask).contiguous(
            memory_format=case["format"]
        )
        maps = torch.randn(case["images"], inputs, *case["size"], generator=random_).to(self.dtype)
        self.tiles = Tiles(*[case["tile"]] * 3)
        self.plan = Plan(self.convolution, self.mask, self.weight.stride(), self.tiles, self.dtype)
        reference = maps.float().requires_grad_()
        weight = self.weight.to(self.dtype).float().requires_grad_()
        output = functional.conv2d(reference, weight, None, *self.convolution[1:])
        gradient = torch.randn(output.shape, generator=random_).to(self.dtype)
        output.backward(gradient.float())
        self.maps, self.gradient = innermost(maps), innermost(gradient)
        self.expected = (innermost(output.detach()), innermost(reference.grad), weight.grad * self.mask)

    def products(self):
        height, width = self.maps.shape[1:3]
        return (
            self.plan.forward(self.maps, self.weight),
            self.plan.input_gradient(self.gradient, self.weight, height, width),
            self.plan.weight_gradient(self.maps, self.gradient, self.weight),
        )


def innermost(maps):
    return maps.permute(1, 2, 3, 0).contiguous()


def error(found, expected):
    return ((found.float() - expected).abs().max() / expected.abs().max().clamp(min=1e-6)).item()


@pytest.mark.parametrize("seed", range(60))
def test_products_equal_conv2d_and_autograd_over_masked_weights(seed):
    case = Case(seed)
    output, of_input, of_weight = case.products()
    for found, expected in ((output, case.expected[0]), (of_input, case.expected[1])):
        assert found.shape == expected.shape
        if case.dtype == FP32:
            assert error(found, expected) <= 1e-5
        else:  # rounded once: by half of the last of 8 bits, besides the sums' own rounding
            allowed = expected.abs() * 2**-8 + 1e-5 * expected.abs().max()
            assert ((found.float() - expected).abs() <= allowed).all()
    assert error(of_weight, case.expected[2]) <= 2e-5
    assert (of_weight[~case.mask] == 0).all()
    assert of_weight.stride() == case.weight.stride()


@pytest.mark.slow
@pytest.mark.usefixtures("loads_anew")
@pytest.mark.parametrize("flags", [("-mavx2", "-mfma"), ()])
def test_the_same_source_is_right_for_smaller_vectors(flags, monkeypatch):
    """AVX2, and what any compiler makes of the vectors."""
    if flags and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("no AVX2 here")
    monkeypatch.setattr(library, "instructions", lambda: flags)
    for seed in range(200, 230):
        case = Case(seed, tile=Tile(*random.Random(seed).choice(GRIDS[library.vector_bytes()]), 1, 3000))
        for found, expected in zip(case.products(), case.expected, strict=True):
            assert error(found, expected) <= (1e-5 if case.dtype == FP32 else 2**-7)


@pytest.mark.parametrize("seed", range(100, 110))
def test_products_do_not_depend_on_the_number_of_threads(seed, monkeypatch):
    case = Case(seed, density=0.3)
    for_threads = []
    for count in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
        for_threads.append(case.products())
    for others in for_threads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(for_threads[0], others, strict=True))


def test_nan_and_infinity_arrive():
    case = Case(0, dtype=BF16, density=1, images=32)
    case.maps[:] = float("nan")
    assert case.products()[0].isnan().any()
    plan = Plan(
        Convolution.of(nn.Conv2d(1, 1, 1)),
        torch.ones(1, 1, 1, 1, dtype=torch.bool),
        (1, 1, 1, 1),
        case.tiles,
        BF16,
    )
    largest = torch.full((1, 1, 1, 32), 3e38, dtype=BF16)
    assert plan.forward(largest, torch.full((1, 1, 1, 1), 2.0)).isinf().all()


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize(
    "shape", [(32, 64, 7, 5), (33, 5, 1, 7), (1, 3, 16, 16), (65, 40, 3, 3), (2, 1, 4, 4), (4, 3, 1, 1)]
)
def test_formats_are_changed_without_loss(dtype, shape):
    maps = torch.randn(shape).to(dtype)
    for before in (maps, maps.contiguous(memory_format=torch.channels_last), maps[:, :, ::2]):
        inside = operator.to_innermost(before)
        assert operator.is_innermost(inside)
        assert torch.equal(inside, before)
        for channels_last in (True, False):
            after = operator.from_innermost(inside, channels_last)
            assert torch.equal(after, before)
            assert after.is_contiguous(
                memory_format=torch.channels_last if channels_last else torch.contiguous_format
            )


def sparse_layer(layer, dtype=FP32):
    """Masked, at a density of a half, and running a kernel."""
    net = nn.Sequential(layer)
    mask_layers(net)
    layer.mask.copy_(torch.rand(layer.mask.shape, generator=torch.Generator().manual_seed(1)) < 0.5)
    with torch.no_grad():
        layer.weight.mul_(layer.mask)
    layer.kernel = SparseKernel(Tiles(*[Tile(*TILES[0], 1, 40000)] * 3), dtype)
    layer.kernel.prepare(layer)
    return net


LAYERS = {
    "conv": (lambda: nn.Conv2d(8, 12, 3, 2, 1), (5, 8, 9, 9)),
    "same": (lambda: nn.Conv2d(8, 12, 3, padding="same", bias=False), (5, 8, 9, 9)),
    "linear": (lambda: nn.Linear(8, 12), (5, 8)),
    "tokens": (lambda: nn.Linear(8, 12), (5, 7, 8)),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("autocast", [False, True])
def test_a_layer_is_its_masked_dense_self(kind, autocast):
    torch.manual_seed(0)
    make, size = LAYERS[kind]
    net = sparse_layer(make(), dtype=BF16 if autocast else FP32)
    images = torch.randn(size, requires_grad=True)
    results = []
    for kernel in (net[0].kernel, None):
        net[0].kernel = kernel
        with torch.autocast("cpu", BF16, enabled=autocast):
            output = net(images)
        output.float().square().sum().backward()
        results.append((output, images.grad, *(parameter.grad for parameter in net.parameters())))
        images.grad = None
        net.zero_grad()
    for found, expected in zip(*results, strict=True):
        assert found.dtype == expected.dtype
        assert error(found, expected.float()) <= (2e-2 if autocast else 1e-5)


@pytest.mark.parametrize(
    ("layer", "size"),
    [(nn.Conv2d(8, 12, 3), (0, 8, 6, 6)), (nn.Conv2d(8, 12, 1), (0, 8, 6, 6)), (nn.Linear(8, 12), (4, 0, 8))],
)
def test_a_batch_without_images(layer, size):
    net = sparse_layer(layer)
    images = torch.randn(size, requires_grad=True)
    output = net(images)
    assert output.numel() == 0
    output.sum().backward()
    assert images.grad.shape == size
    assert (layer.weight.grad == 0).all()


@pytest.mark.parametrize(
    ("case", "kernel"),
    [("autocast", FP32), ("none", BF16), ("double", FP32), ("half", FP32), ("bf16 weights", BF16)],
)
def test_another_precision_than_the_plans_is_dense(case, kernel):
    net, images = sparse_layer(nn.Conv2d(8, 12, 3), kernel), torch.randn(5, 8, 6, 6)
    if case != "autocast" and case != "none":
        dtype = {"double": torch.float64, "half": torch.float16, "bf16 weights": BF16}[case]
        net, images = net.to(dtype), images.to(dtype)
    with torch.autocast("cpu", BF16, enabled=case == "autocast"):
        output, expected = net(images), net[0].dense(images)
    output.sum().backward()
    assert torch.equal(output, expected)


@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (nn.Conv2d(8, 12, 3), (4, 6, 6)),
        (nn.Conv2d(8, 12, 3), (2, 8, 2, 2)),
        (nn.Conv2d(8, 12, 3), (8, 6, 6)),
        (nn.Conv2d(8, 12, 3), (2, 4, 6, 6)),
        (nn.Linear(8, 12), (2, 4)),
        (nn.Linear(8, 12), (8,)),
    ],
)
def test_sizes_are_taken_or_refused_as_by_the_dense_layer(layer, size):
    net, images = sparse_layer(layer), torch.randn(size)
    results = []
    for run in (net, layer.dense):
        try:
            results.append(run(images).tolist())
        except RuntimeError as error:
            results.append(str(error))
    assert results[0] == results[1]


@pytest.mark.parametrize("sizes", [(1, 16384, 2**15), (2**30, 1, 1)])
def test_maps_that_offsets_do_not_reach_are_dense(sizes, monkeypatch):
    net = sparse_layer(nn.Conv2d(8, 12, 1))
    monkeypatch.setattr(MaskedConv2d, "dense", lambda layer, images: images)
    images, height, width = sizes
    maps = torch.zeros(1).expand(images, 8, height, width)
    assert net(maps) is maps


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Conv2d(8, 12, 3, padding=1, padding_mode="reflect"), "padding mode reflect"),
        (nn.Conv2d(8, 12, 2, padding="same"), "uneven padding"),
        (nn.Linear(8, 12).bfloat16(), "weights are torch.bfloat16"),
        (nn.Linear(8, 12, device="meta"), "on meta, not a CPU"),
    ],
)
def test_layers_that_a_kernel_computes_wrongly_are_refused(layer, reason):
    with pytest.raises(KernelUnavailableError, match=reason):
        sparse_layer(layer)


def test_evaluation_is_dense():
    net = sparse_layer(nn.Conv2d(8, 12, 3)).eval()
    images = torch.randn(2, 8, 6, 6)
    assert torch.equal(net(images), functional.conv2d(images, net[0].weight, net[0].bias))


def test_the_operators_keep_torchs_rules():
    """Schema, fake tensors, autograd and compilation."""
    layer = sparse_layer(nn.Conv2d(8, 12, 3))[0]
    maps = operator.to_innermost(torch.randn(2, 8, 6, 6)).requires_grad_()
    assert isinstance(layer, MaskedConv2d)
    weight = layer.weight.detach().requires_grad_()
    torch.library.opcheck(operator.gather, (maps, weight, 4, 4, layer.kernel.number))
    torch.library.opcheck(operator.to_innermost, (torch.randn(2, 3, 4, 5).requires_grad_(),))
    torch.library.opcheck(operator.from_innermost, (maps, True))


def test_equal_layers_share_compiled_code():
    """Or a model whose blocks are compiled one by one runs out of compilations."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    images = torch.randn(2, 8, 6, 6, requires_grad=True)
    for _ in range(4):
        net = sparse_layer(nn.Conv2d(8, 8, 3, padding=1))
        expected = net(images)
        net.compile()
        output = net(images)
        output.sum().backward()
        torch.testing.assert_close(output, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_plan_reads_weights_of_any_strides():
    case = Case(
        3,
        convolution=Convolution((3, 3), (1, 1), (1, 1), (1, 1), 1),
        format=torch.contiguous_format,
        dtype=FP32,
    )
    other = case.weight.contiguous(memory_format=torch.channels_last)
    assert torch.equal(case.plan.forward(case.maps, other), case.plan.forward(case.maps, case.weight))
    gradient = case.plan.weight_gradient(case.maps, case.gradient, other)
    assert gradient.stride() == other.stride()  # as compiled code expects it
    assert torch.equal(gradient, case.products()[2])


def test_a_weight_with_gaps_has_a_gradient_without():
    layer = nn.Linear(64, 64)
    layer.weight = nn.Parameter(torch.randn(64, 128)[:, ::2])
    net, rows = sparse_layer(layer), torch.randn(4, 64)
    net(rows).sum().backward()
    expected = torch.ones(64, 4) @ rows * layer.mask
    assert error(layer.weight.grad, expected) <= 1e-5


def test_names_make_kernels_again():
    tiles = Tiles(Tile(1, 7, 2, 40000), Tile(2, 4, 1, 100), Tile(1, 8, 1, 7))
    for dtype in (FP32, BF16):
        kernel = SparseKernel(tiles, dtype)
        for again in (kernel_named(kernel.name), pickle.loads(pickle.dumps(kernel)), copy.deepcopy(kernel)):
            assert (again.tiles, again.dtype, again.name) == (tiles, dtype, kernel.name)
            assert again.number != kernel.number
    for name in (
        "",
        "sparse",
        "sparse fp32 1x1x1/1 1x1x1/1",
        "sparse fp64 1x1x1/1 1x1x1/1 1x1x1/1",
        "sparse fp32 a b c",
    ):
        assert kernel_named(name) is None


@pytest.mark.parametrize("layer", [nn.Conv2d(8, 8, 1), nn.Linear(8, 8)])
def test_a_loaded_mask_is_the_kernels_too(layer):
    net = sparse_layer(layer)
    state = {**net.state_dict(), "0.mask": ~layer.mask, "0.weight": torch.randn_like(layer.weight)}
    net.load_state_dict(state)
    images = torch.randn(8, 8, 1, 1) if layer.weight.dim() == 4 else torch.randn(8, 8)
    torch.testing.assert_close(net(images), layer.dense(images))


def test_a_copied_layer_has_a_plan_of_its_own():
    net = sparse_layer(nn.Conv2d(8, 12, 3))
    images = torch.randn(2, 8, 6, 6)
    before = net(images)
    other = copy.deepcopy(net)
    other[0].mask.fill_(False)
    other[0].kernel.prepare(other[0])
    assert torch.equal(net(images), before)
    assert (other(images) == other[0].bias[:, None, None]).all()


def test_a_kernel_that_offsets_do_not_reach_runs_dense():
    layer = nn.Conv2d(2, 2, 3, padding=5000, dilation=5000)
    with pytest.raises(KernelUnavailableError, match="spans too many pixels"):
        sparse_layer(layer)
    choices = choose_kernels(SparseFamily(FP32), {"conv": layer}, {"conv": [Call(4, 2, 2)]}, 1)
    assert [choice.kernel for choice in choices] == [None]
    assert choices[0].reason == "the kernel spans too many pixels"


def test_copies_of_a_layer_run_in_threads():
    net = sparse_layer(nn.Conv2d(64, 64, 3))
    other, images = copy.deepcopy(net), torch.randn(4, 64, 16, 16)
    with torch.no_grad():
        other[0].weight.mul_(3)

    def run(copied):
        with torch.no_grad():
            return [copied(images) for _ in range(50)]

    with ThreadPoolExecutor(2) as pool:
        for outputs in pool.map(run, (net, other)):
            assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_a_frozen_plan_has_no_gradients():
    layer = sparse_layer(nn.Conv2d(8, 12, 3))[0]
    layer.kernel = FrozenKernel(layer.kernel.tiles, FP32)
    layer.kernel.prepare(layer)
    with pytest.raises(RuntimeError, match="a model for inference has no gradients"):
        layer(torch.randn(2, 8, 6, 6)).sum().backward()


def test_a_kernel_taken_away_before_the_backward_pass_is_said_so():
    net = sparse_layer(nn.Conv2d(8, 12, 3))
    output = net(torch.randn(2, 8, 6, 6))
    net[0].kernel = None
    with pytest.raises(RuntimeError, match="taken away after the forward pass"):
        output.sum().backward()


def test_tiles_without_code_are_refused():
    tile = Tile(9, 9, 1, 100)
    with pytest.raises(KernelUnavailableError, match="no code for the tiles"):
        Case(0, tile=tile)


@pytest.mark.usefixtures("loads_anew")
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("CXX", "PROGRAM", "Exec format error"),
        ("CXX", "/bin/false", "/bin/false failed"),
        ("CXXFLAGS", "-DX='a", "No closing quotation"),
        ("TORCHINDUCTOR_CACHE_DIR", "PROGRAM", "File exists"),
    ],
)
def test_what_hinders_a_build_is_said_so(name, value, message, monkeypatch, tmp_path):
    program = tmp_path / "program"
    program.write_text("no program")
    program.chmod(0o755)
    monkeypatch.setenv(name, value.replace("PROGRAM", str(program)))
    with pytest.raises(library.BuildError, match=message):
        library.load()


def test_nothing_is_loaded_from_a_folder_that_another_user_made(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setattr(library.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = library._cache_folder()
    assert folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(library.os, "getuid", lambda: 12345)
    folder.rename(tmp_path / "acdc-kernels-12345")
    with pytest.raises(library.BuildError, match="belongs to another user: set TORCHINDUCTOR_CACHE_DIR"):
        library._cache_folder()


LINEAR = Shape(33, 8, 16, *(1, 1) * 2, 0, 0, 1, 1, 1, 1, 1, 20)
SHAPE = Shape(33, 8, 16, 3, 3, 2, 2, 1, 1, 1, 1, 1, 9, 9, 20)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_shape_is_measured_and_its_kernel_named(dtype):
    measured = SparseFamily(dtype).measure(SHAPE)
    assert len(measured.timings) == 3
    assert all(timing.right and timing.dense > 0 and timing.sparse > 0 for timing in measured.timings)
    chosen = SparseFamily.choose(measured, required=True)
    assert chosen.name == measured.kernel
    assert set(chosen.tiles) <= set(candidates(SHAPE, dtype))


@pytest.mark.parametrize(
    ("layer", "calls", "expected"),
    [
        (nn.Conv2d(8, 16, 3, 2, 1), [Call(25, 9, 9)], SHAPE._replace(percent=100)),
        (
            nn.Conv2d(8, 8, 1, groups=8),
            [Call(4, 2, 2), Call(9, 3, 3)],
            (33, 8, 8, *(1, 1) * 2, 0, 0, 1, 1, 8, 3, 3, 100),
        ),
        (nn.Linear(4, 6), [Call(7, 1, 7)], (33 * 7, 4, 6, *(1, 1) * 2, 0, 0, 1, 1, 1, 1, 1, 100)),
        (nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), [Call(4, 2, 2)], "padding mode reflect"),
        (nn.Conv2d(8, 8, 2, padding="same"), [Call(4, 2, 2)], "uneven padding"),
        (nn.Conv2d(8, 8, 1), [Call(10**9, 10**5, 10**4)], "images are too large"),
        (nn.Conv2d(8, 8, 1, padding=5000), [Call(10**8, 2, 2)], "images are too large"),
    ],
)
def test_the_shape_of_a_layer_or_why_it_runs_dense(layer, calls, expected):
    mask_layers(nn.Sequential(layer))
    assert SparseFamily(FP32).shape(layer, calls, 33) == expected


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("shape", [SHAPE, SHAPE._replace(kernel_y=1, kernel_x=1, groups=8), LINEAR])
def test_the_dense_product_of_a_compiled_model_is_conv2d(dtype, shape, monkeypatch):
    trial = family._Trial(shape, dtype, inference=True)
    expected = trial._dense_forward()
    product = trial._dense_frozen()
    assert dtype == BF16 or product != trial._dense_forward or not torch.backends.mkldnn.is_available()
    assert error(product(), expected) <= (1e-5 if dtype == FP32 else 2**-7)
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace())  # of a torch without these operators
    assert torch.equal(trial._dense_frozen()(), expected)


@pytest.mark.parametrize("size", [(7, 7), (56, 56), (32, 32), (1, 1), (3, 5), (224, 224)])
@pytest.mark.parametrize("images", [1, 32, 65])
def test_tiles_worth_measuring_waste_little(size, images):
    for dtype in (FP32, BF16):
        for kernel in (1, 3):
            shape = Shape(images, 8, 16, kernel, kernel, 1, 1, *(kernel // 2,) * 2, 1, 1, 1, *size, 20)
            tiles = candidates(shape, dtype)
            assert 2 <= len(tiles) <= 4
            assert len(set(tiles)) == len(tiles)
            assert all((tile.rows, tile.columns * tile.units) in TILES for tile in tiles)


@pytest.mark.parametrize("seed", range(300, 340))
def test_frozen_products_equal_conv2d_whatever_fills_the_vectors(seed):
    images = random.Random(seed).choice([1, 1, 2, 3, 7, 17, 40])
    case = Case(seed, images=images)
    plan = FrozenPlan(case.convolution, case.weight, case.tiles.forward, case.dtype)
    found, expected = plan.infer(case.maps, None, None, False), case.expected[0]
    exact = 1e-5 if case.dtype == FP32 else 2**-7
    assert error(found, expected) <= exact
    assert torch.equal(found, plan.infer(case.maps, None, None, False))
    bias, other = torch.randn(len(expected)), torch.randn(expected.shape).to(case.dtype)
    behind = (expected.float() + bias[:, None, None, None] + other.float()).relu()
    assert error(plan.infer(case.maps, other, bias, True), behind) <= exact
    assert error(plan.infer(case.maps, None, bias, False), expected + bias[:, None, None, None]) <= exact
    assert error(plan.infer(case.maps, other, None, False), expected + other.float()) <= exact


def test_a_frozen_plan_keeps_what_few_sizes_of_maps_need(monkeypatch):
    made, freed = [], []

    class Counting:
        def __getattr__(self, name):
            return getattr(native, name)

        def layer_new_forward(self, *arguments):
            made.append(arguments[-1])  # the output width; 0: of no size
            return native.layer_new_forward(*arguments)

        def layer_free(self, pointer):
            freed.append(pointer)
            native.layer_free(pointer)

    native = library.load()
    monkeypatch.setattr(library, "load", Counting)
    layer = nn.Conv2d(4, 6, 3, padding=1, bias=False)
    plan = FrozenPlan(Convolution.of(layer), layer.weight, Tile(*TILES[0], 1, 40000), FP32)

    def check(size):
        images = torch.randn(1, 4, size, size)
        with torch.no_grad():
            found = plan.infer(images.permute(1, 2, 3, 0).contiguous(), None, None, False)
            assert error(found.permute(3, 0, 1, 2), layer(images)) <= 1e-5

    sizes = range(6, 6 + SIZES)
    for size in (5, *sizes, *sizes, 5, 6):  # 5 displaces 6, which was not used for the longest time
        check(size)
    assert made == [0, 5, *sizes, 5, 6]
    assert len(freed) == 3
    with ThreadPoolExecutor(4) as pool:  # in turn, of more sizes than are kept
        list(pool.map(check, [5 + 7 * number % 13 for number in range(200)]))
    plan = None
    assert len(freed) == len(made)
