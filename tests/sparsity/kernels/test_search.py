"""The search for algorithms, and times by the device's clock, with a library and a device that are given."""

import copy
import pickle
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sparsity import ACDC, PhaseSchedule, Run24, Transposable24
from sparsity.execution import kernel_named
from sparsity.kernels import measure
from sparsity.kernels.measure import Measured, Timing, median_seconds
from sparsity.kernels.semi_structured import family, operator, search
from sparsity.kernels.semi_structured.family import Family24, Shape
from sparsity.kernels.semi_structured.kernel import Tuning, kernel24
from sparsity.kernels.semi_structured.search import DEFAULT, Algorithm, algorithms, fastest

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FAST, WRONG, UNSTEADY, REFUSED, SILENT = map(Algorithm, range(1, 6))


SECONDS = {DEFAULT: 3.0, FAST: 2.0, WRONG: 1.0, UNSTEADY: 1.0, SILENT: 1.0, Algorithm(9): 2.99}


class Product:
    """What each algorithm gives, and the seconds it takes."""

    expected = torch.arange(1.0, 13).view(3, 4)

    def __init__(self, monkeypatch):
        self.calls = 0
        monkeypatch.setattr(search, "median_seconds", lambda run, device, least: SECONDS[run.args[0]])

    def __call__(self, algorithm):
        self.calls += 1
        if algorithm == REFUSED:
            raise RuntimeError("CUDA error: operation not supported when calling cusparseLtMatmul")
        if algorithm == WRONG:
            return 1.05 * self.expected
        if algorithm == UNSTEADY:
            return self.expected + 1e-5 * self.calls
        if algorithm == SILENT:
            return torch.full_like(self.expected, torch.nan)
        return self.expected.clone()


def test_the_fastest_that_is_right_is_found(monkeypatch):
    product = Product(monkeypatch)
    best, seconds = fastest(product, product.expected, [DEFAULT, FAST, WRONG, UNSTEADY, REFUSED, SILENT])
    assert best == FAST
    refused = dict.fromkeys([WRONG, UNSTEADY, REFUSED, SILENT])
    assert seconds == {DEFAULT: 3.0, FAST: 2.0, **refused}


@pytest.mark.parametrize("among", [[DEFAULT, WRONG, REFUSED], [WRONG, REFUSED], [], [DEFAULT, Algorithm(9)]])
def test_the_default_remains_where_nothing_is_right_and_faster(monkeypatch, among):
    product = Product(monkeypatch)
    assert fastest(product, product.expected, among)[0] == DEFAULT


def test_memory_that_is_short_is_said():
    def full(algorithm):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        fastest(full, Product.expected, [DEFAULT])


def rows_on_cuda(dtype=torch.bfloat16):
    return SimpleNamespace(device=CUDA, dtype=dtype, t=lambda: None)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ((2, 1, 0, 3), [DEFAULT, Algorithm(2), Algorithm(1)]),  # not split: the mode means nothing
        ((0, 4, 2, 2), [DEFAULT, Algorithm(0, 4, 2), Algorithm(1)]),
        ((1, -1, 2, 2), [DEFAULT, Algorithm(1, -1, 2), Algorithm(1)]),  # as an H200 answers
        (RuntimeError("CUDA error: internal error"), [DEFAULT]),
        (TypeError("incompatible function arguments"), [DEFAULT]),
        (None, [DEFAULT]),
    ],
)
def test_what_the_library_names_is_tried(monkeypatch, answer, expected):
    def mm_search(*arguments):
        if isinstance(answer, Exception):
            raise answer
        return answer

    library = None if answer is None else SimpleNamespace(mm_search=mm_search)
    monkeypatch.setattr(torch._C, "_cusparselt", library, raising=False)
    assert algorithms(rows_on_cuda(), None) == expected


def test_nothing_is_searched_in_fp16(monkeypatch):
    """The library's search in fp16 broke the process on an H200."""
    library = SimpleNamespace(mm_search=lambda *_: pytest.fail("searched"))
    monkeypatch.setattr(torch._C, "_cusparselt", library, raising=False)
    assert algorithms(rows_on_cuda(torch.float16), None) == [DEFAULT]


def test_a_search_without_memory_is_not_an_answer(monkeypatch):
    def mm_search(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch._C, "_cusparselt", SimpleNamespace(mm_search=mm_search), raising=False)
    with pytest.raises(torch.OutOfMemoryError):
        algorithms(rows_on_cuda(), None)


def test_the_reference_has_one():
    assert algorithms(torch.zeros(8, 16), torch.zeros(16, 10)) == [DEFAULT]


TUNED = Tuning("reference", "float32", 128, Algorithm(3, 2, 1), Algorithm(7, -1, -1))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("tuning", [None, TUNED, TUNED._replace(place="sm90/800", dtype="bfloat16")])
def test_names_make_kernels_again(transposed, tuning):
    made = kernel24(transposed, tuning)
    for again in (kernel_named(made.name), pickle.loads(pickle.dumps(made)), copy.deepcopy(made)):
        assert again is made  # one object: equal layers share compiled code
    assert made.title in ("2:4 forward", "2:4 forward and input gradient")
    chain = [each.title for each in made.chain()]
    assert chain == (["2:4 forward and input gradient"] if transposed else []) + ["2:4 forward"]
    assert made.fallback is None or made.fallback.tuning == (tuning and tuning._replace(gradient=DEFAULT))


@pytest.mark.parametrize(
    "name", ["2:4 forward ", "2:4 forward x", "2:4 forward sm90/800 bfloat16 8: 1/1 0/1/-1", "2:4 backward"]
)
def test_other_names_are_no_kernels(name):
    assert kernel_named(name) is None


def test_a_family_has_kernels_of_its_library_and_precision_alone():
    mine = Family24(CPU, torch.float32, True)
    assert mine.has(Run24.TRANSPOSED)
    assert mine.has(kernel24(True, TUNED))
    assert not mine.has(kernel24(True, TUNED._replace(dtype="bfloat16")))
    assert not mine.has(kernel24(True, TUNED._replace(place="sm90/800")))


@pytest.fixture
def passed(monkeypatch):
    """Algorithms that reach the product, in the order of calls."""
    seen, packed = [], operator.matmul24

    def note(rows, compressed, outputs, algorithm=None):
        seen.append(algorithm)
        return packed(rows, compressed, outputs, algorithm)

    monkeypatch.setattr(operator, "matmul24", note)
    return seen


LAYERS = {
    "linear": (nn.Linear(32, 48), (4, 32, 32)),
    "convolution": (nn.Conv2d(32, 48, 1), (8, 32, 4, 4)),
    "stride": (nn.Conv2d(32, 48, 1, 2), (8, 32, 7, 8)),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("compiled", [False, True])
def test_algorithms_reach_both_products(passed, kind, compiled):
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer, size = LAYERS[kind]
    net = nn.Sequential(copy.deepcopy(layer))
    acdc = ACDC(net, Transposable24(), PhaseSchedule.parse("sparse 1"), 1)
    acdc.attach(torch.optim.SGD(net.parameters(), 0.1))
    acdc.before_step()
    acdc.accelerate({"0": kernel24(True, TUNED)})
    call = torch.compile(net, backend="aot_eager", fullgraph=True) if compiled else net
    images = torch.randn(size, requires_grad=True)
    call(images).sum().backward()
    assert [list(each) for each in passed] == [[3, 2, 1], [7, -1, -1]]
    passed.clear()
    # of another number of rows nothing is known
    images = torch.randn(2 * size[0], *size[1:], requires_grad=True)
    call(images).sum().backward()
    assert passed == [None, None]


def test_algorithms_of_another_library_stay_away(passed):
    net = nn.Sequential(nn.Linear(32, 48))
    acdc = ACDC(net, Transposable24(), PhaseSchedule.parse("sparse 1"), 1)
    acdc.attach(torch.optim.SGD(net.parameters(), 0.1))
    acdc.before_step()
    acdc.accelerate({"0": kernel24(True, TUNED._replace(place="sm80/700"))})
    net(torch.randn(128, 32)).sum().backward()
    assert passed == [None]


@pytest.mark.parametrize("shape", [Shape(32, 48, 64), Shape(32, 48, 64, 8, 8, 2, 2)])
def test_a_shape_is_searched_measured_and_named(monkeypatch, shape):
    found = iter([Algorithm(5), Algorithm(6, 2, 1)])
    monkeypatch.setattr(family, "algorithms", lambda rows, compressed: [DEFAULT, Algorithm(1)])
    monkeypatch.setattr(family, "fastest", lambda product, expected, among: (next(found), {}))
    monkeypatch.setattr(measure, "median_seconds", lambda call, device: 1.0)
    measured = Family24(CPU, torch.float32, True).measure(shape)
    assert measured.forward.right
    assert measured.gradient.right
    tuning = Tuning("reference", "float32", 32, Algorithm(5), Algorithm(6, 2, 1))
    assert Family24.choose(measured, required=True) is kernel24(True, tuning)
    won, lost = Timing(2.0, 1.0, 0.0), Timing(1.0, 2.0, 0.0)
    chosen = Family24.choose(Measured(won, lost, kernel=measured.kernel))
    assert chosen is kernel24(False, tuning._replace(gradient=DEFAULT))
    assert Family24.choose(Measured(lost, won, kernel=measured.kernel)) is None


def test_an_algorithm_that_is_wrong_in_the_layer_is_not_taken(monkeypatch):
    right = family.mm24

    def mm24(rows, weight, back, algorithm):
        return right(rows, weight, back) * (1 if algorithm == DEFAULT else 1.05)

    monkeypatch.setattr(family, "mm24", mm24)
    monkeypatch.setattr(family, "algorithms", lambda rows, compressed: [DEFAULT, Algorithm(1)])
    monkeypatch.setattr(family, "fastest", lambda product, expected, among: (Algorithm(1), {}))
    measured = Family24(CPU, torch.float32, False).measure(Shape(32, 48, 64))
    assert measured.forward.right
    assert Family24.choose(measured, required=True) is Run24.FORWARD


class Device:
    """A clock in microseconds: the host's and the device's, which runs what is queued in turn."""

    def __init__(self, launch, compute):
        self.launch, self.compute = launch, compute
        self.host = self.device = 0.0
        self.calls = 0

    def queue(self, launch, compute):
        self.host += launch
        self.device = max(self.device, self.host) + compute

    def __call__(self):
        self.calls += 1
        self.queue(self.launch, self.compute)

    def synchronize(self):
        self.host = max(self.host, self.device)

    def event(self, enable_timing):
        event = SimpleNamespace(at=None)
        event.record = lambda: setattr(event, "at", max(self.host, self.device))
        event.query = lambda: event.at <= self.host
        event.elapsed_time = lambda last: (last.at - event.at) / 1e3
        return event


@pytest.fixture
def device(monkeypatch):
    def make(launch, compute):
        made = Device(launch, compute)
        monkeypatch.setattr(torch.cuda, "Event", made.event)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: made.queue(5, cycles / 2000))
        monkeypatch.setattr(torch.cuda, "synchronize", made.synchronize)
        monkeypatch.setattr(torch.cuda, "device", nullcontext)
        monkeypatch.setattr(measure.time, "perf_counter", lambda: made.host / 1e6)
        return made

    return make


@pytest.mark.parametrize(("launch", "compute"), [(100, 20), (10, 20), (1000, 5), (10, 3000), (30, 30)])
def test_a_launch_that_takes_longer_than_the_kernel_is_not_counted(device, launch, compute):
    made = device(launch, compute)
    assert median_seconds(made, CUDA) == pytest.approx(compute / 1e6)
    assert made.calls <= 2 + 8 * 40


def test_a_call_that_waits_for_the_device_ends_the_measuring(device):
    made = device(10, 50)

    def call():
        made()
        made.synchronize()

    assert median_seconds(call, CUDA) >= 50e-6
    assert made.host < 5e6


def test_a_kernel_that_writes_nothing_is_wrong():
    """The memory of the dense product's result, which is free by then, is not taken for its own."""
    memory = torch.empty(4, 4)
    timing = measure.compare(lambda: memory.fill_(2.0), lambda: memory)
    assert timing.dense > 0
    assert not timing.right
