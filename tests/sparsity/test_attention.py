"""Masked attention equals torch.nn.MultiheadAttention with the same weights, dropped ones 0: outputs, and
gradients times the masks, in whatever way it is called."""

import copy
import pickle

import pytest
import torch
from torch import nn

from data.torchvision_import import import_torchvision
from sparsity import ACDC, AveragedModel, GlobalMagnitude, MaskedAttention, PhaseSchedule, count_flops
from sparsity.guard import find_escaping
from sparsity.kernels.unstructured.library import find_compiler
from sparsity.layers import UnmaskableError, mask_layers, to_plain

WIDTH, HEADS, PLACES, BATCH = 12, 3, 5, 2
CAUSAL = torch.ones(PLACES, PLACES, dtype=torch.bool).triu(1)
PADDING = torch.tensor([[False] * PLACES, [False] * (PLACES - 2) + [True] * 2])


def pair(**options):
    """A masked attention with about half of its weights, and torch's with 0 for the others."""
    torch.manual_seed(1)
    plain = nn.MultiheadAttention(WIDTH, HEADS, **options)
    for parameter in plain.parameters():
        nn.init.normal_(parameter, std=0.3)
    attention = copy.deepcopy(plain)
    layers = mask_layers(attention)
    for layer in layers.values():
        layer.mask.copy_(torch.rand(layer.weight.shape) > 0.5)
    masks = {name if "in_proj" in name else f"{name}.weight": layer.mask for name, layer in layers.items()}
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.mul_(masks.get(name, 1))
    return attention, plain, masks


def check_equal(options, call, operands, training=False):
    attention, plain, masks = pair(**options)
    results = []
    for module in (attention.train(training), plain.train(training)):
        given = [operand.clone().requires_grad_() for operand in operands]
        torch.manual_seed(2)
        # one tensor is handed over three times, two are query and what it looks at
        output, weights = module(*given, *[given[-1]] * (3 - len(given)), **call)
        (output * torch.linspace(-1, 1, output.numel()).view(output.shape)).sum().backward()
        results.append((output, weights, [each.grad for each in given]))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    for (name, ours), theirs in zip(attention.named_parameters(), plain.parameters(), strict=True):
        expected = theirs.grad * masks.get(name, 1)
        torch.testing.assert_close(ours.grad, expected, rtol=1e-5, atol=1e-5, msg=name)
    assert set(masks) == {"in_proj_weight", "out_proj.weight"}


def batches(batch_first, count=1, places=PLACES):
    torch.manual_seed(3)
    shape = (BATCH, places, WIDTH) if batch_first else (places, BATCH, WIDTH)
    return [torch.randn(shape) for _ in range(count)]


CALLS = [
    {"need_weights": False},  # what vision transformers do: the path of its own
    {},
    {"average_attn_weights": False},
    {"attn_mask": CAUSAL, "need_weights": False},
    {"attn_mask": CAUSAL, "need_weights": False, "is_causal": True},
    {"attn_mask": torch.randn(BATCH * HEADS, PLACES, PLACES)},
    {"key_padding_mask": PADDING, "need_weights": False},
    {"key_padding_mask": PADDING, "attn_mask": CAUSAL},
]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("call", CALLS, ids=lambda call: "-".join(call) or "default")
def test_it_equals_torchs(call, batch_first):
    check_equal({"batch_first": batch_first}, call, batches(batch_first))
    check_equal({"batch_first": batch_first, "bias": False}, call, batches(batch_first))
    check_equal({"batch_first": batch_first, "dropout": 0.4}, call, batches(batch_first), training=True)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"add_bias_kv": True}, {"add_zero_attn": True}, {"kdim": WIDTH, "vdim": WIDTH}], ids=str
)
def test_it_equals_torchs_in_other_forms(options, batch_first):
    options = {**options, "batch_first": batch_first}
    for count in (1, 2, 3):
        check_equal(options, {"need_weights": False}, batches(batch_first, count))
    check_equal(options, {}, [torch.randn(PLACES, WIDTH)])  # no batch


def test_widths_of_their_own_leave_three_projections_dense():
    attention = nn.MultiheadAttention(WIDTH, HEADS, kdim=4, vdim=6)
    assert list(mask_layers(attention)) == ["out_proj"]
    plain = to_plain(attention)
    query, key, value = torch.randn(3, WIDTH), torch.randn(4, 4), torch.randn(4, 6)
    assert torch.equal(attention(query, key, value)[0], plain(query, key, value)[0])


def net(**options):
    """Two attentions between layers."""
    torch.manual_seed(0)
    return Net(**options)


class Block(nn.Module):
    def __init__(self, options):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **options)
        self.mlp = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, need_weights):
        x = x + self.attention(x, x, x, need_weights=need_weights)[0]
        return x + self.mlp(x).relu()


class Net(nn.Module):
    def __init__(self, need_weights=False, **options):
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 4, 4)
        self.blocks = nn.ModuleList([Block(options), Block(options)])
        self.head, self.need_weights = nn.Linear(WIDTH, 10), need_weights

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x, self.need_weights)
        return self.head(x.mean(1))


NAMES = [
    "stem",
    *(
        f"blocks.{number}.{name}"
        for number in (0, 1)
        for name in ("attention.in_proj_weight", "attention.out_proj", "mlp")
    ),
    "head",
]


def test_names_of_layers_and_parameters():
    model = net()
    parameters, state = dict(model.named_parameters()), set(model.state_dict())
    layers = mask_layers(model)
    assert list(layers) == NAMES
    assert list(model.named_parameters()) == list(parameters.items())
    kept = "blocks.0.attention.in_proj_weight"
    assert layers[kept].weight is parameters[kept]
    masks = {name for name in model.state_dict() if name.endswith(".mask")}
    assert set(model.state_dict()) - masks == state
    assert len(masks) == len(NAMES)
    assert layers[kept].mask.shape == (3 * WIDTH, WIDTH)


def test_checkpoints_load_both_ways():
    model, x = net(), torch.randn(2, 3, 8, 8)
    torch.manual_seed(9)
    other = Net()
    layers = mask_layers(other)
    missing, unexpected = other.load_state_dict(model.state_dict(), strict=False)
    assert (len(missing), unexpected) == (len(NAMES), [])
    torch.testing.assert_close(other(x), model(x))
    for layer in layers.values():
        layer.mask.copy_(torch.rand(layer.mask.shape) > 0.5)
    plain = to_plain(other)
    assert type(plain.blocks[0].attention) is nn.MultiheadAttention
    assert type(plain.blocks[0].attention.out_proj) is type(model.blocks[0].attention.out_proj)
    assert vars(plain.blocks[0].attention).keys() == vars(model.blocks[0].attention).keys()
    assert [name for name, _ in plain.named_modules()] == [name for name, _ in model.named_modules()]
    model.load_state_dict(plain.state_dict())
    torch.testing.assert_close(model(x), other(x))
    again = Net()
    mask_layers(again)
    again.load_state_dict(other.state_dict())
    assert torch.equal(again(x), other(x))


def test_copies_have_weights_of_their_own():
    model, x = net(), torch.randn(2, 3, 8, 8)
    layers = mask_layers(model)
    for layer in layers.values():
        layer.mask.copy_(torch.rand(layer.mask.shape) > 0.5)
    expected = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), AveragedModel(model).module):
        attention = twin.blocks[0].attention
        assert attention.in_proj.weight is attention.in_proj_weight
        assert attention.in_proj_weight is not model.blocks[0].attention.in_proj_weight
        assert torch.equal(twin(x), expected)


@pytest.mark.parametrize(("optimizer", "need_weights"), [(torch.optim.SGD, False), (torch.optim.AdamW, True)])
def test_dropped_weights_stay_zero_in_training(optimizer, need_weights):
    model = net(dropout=0.1, need_weights=need_weights)
    acdc = ACDC(model, GlobalMagnitude(0.8), PhaseSchedule.parse("(dense 1, sparse 1) x2"), 2)
    options = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    acdc.attach(trained := optimizer(model.parameters(), lr=0.05, **options))
    assert find_escaping(model, acdc.layers, torch.randn(1, 3, 8, 8)) == []
    for step in range(8):
        acdc.before_step()
        model(torch.randn(4, 3, 8, 8)).square().mean().backward()
        trained.step()
        trained.zero_grad()
        dropped = sum(int((~mask).sum()) for mask in acdc.masks().values())
        assert (dropped > 0) == (step // 2 % 2 == 1)
        assert all(not acdc.weights()[name][~mask].any() for name, mask in acdc.masks().items())
    mask = acdc.masks()["blocks.1.attention.in_proj_weight"]
    assert 0 < mask.sum() < mask.numel()
    plain, x = acdc.export(), torch.randn(3, 3, 8, 8)
    torch.testing.assert_close(plain.eval()(x), model.eval()(x))


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.rare)])
def test_compiled_it_equals_eager_and_switches_cost_no_graph(backend):
    model, x = net(), torch.randn(2, 3, 8, 8)
    layers = mask_layers(model)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, backend=backend)
    for share in (0.0, 0.5, 0.0, 0.8):
        for layer in layers.values():
            layer.mask.copy_(torch.rand(layer.mask.shape) >= share)
        results = []
        for each in (model, compiled):
            model.zero_grad()
            output = each(x)
            output.square().sum().backward()
            results.append([output, *(parameter.grad.clone() for parameter in model.parameters())])
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


class Own(nn.MultiheadAttention):
    """Forms its weights first."""

    def forward(self, *arguments, **keywords):
        return super().forward(*arguments, **keywords)


class Initialised(nn.MultiheadAttention):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        nn.init.normal_(self.in_proj_weight)


def test_subclasses():
    model = nn.ModuleDict({"own": Own(4, 2), "fc": nn.Linear(4, 4), "mine": Initialised(4, 2)})
    with pytest.raises(UnmaskableError, match=r"'own\.in_proj_weight' belongs to a \S+Own, a ") as error:
        mask_layers(model)
    assert error.value.exclude == ["own.in_proj_weight", "own.out_proj"]
    masked = mask_layers(model, exclude=error.value.exclude)
    assert list(masked) == ["fc", "mine.in_proj_weight", "mine.out_proj"]
    assert type(model["own"]) is Own
    assert type(model["mine"]) is MaskedAttention
    assert type(to_plain(model)["mine"]) is Initialised


def test_a_part_of_it_may_stay_dense():
    for exclude, left in (("*.out_proj", "in_proj_weight"), ("*.in_proj_weight", "out_proj")):
        model, x = net(), torch.randn(2, 3, 8, 8)
        expected = model(x)
        layers = mask_layers(model, include=["*.attention.*"], exclude=[exclude])
        assert list(layers) == [f"blocks.{number}.attention.{left}" for number in (0, 1)]
        torch.testing.assert_close(model(x), expected)
        layers[f"blocks.0.attention.{left}"].mask.zero_()
        changed = model(x)
        assert not torch.allclose(changed, expected)
        assert find_escaping(model, layers, x) == []
        torch.testing.assert_close(to_plain(model)(x), changed)
    rest = mask_layers(model, include=["*.in_proj_weight"])  # by another call
    assert rest.keys() == {f"blocks.{number}.attention.in_proj_weight" for number in (0, 1)}
    with pytest.raises(ValueError, match=r"'blocks\.0\.attention\.in_proj_weight' is masked already"):
        mask_layers(model, include=["*.in_proj_weight"])


def test_what_is_refused(caplog):
    shared = net()
    shared.blocks[0].attention.in_proj_weight = shared.blocks[1].attention.in_proj_weight
    with pytest.raises(ValueError, match=r"in_proj_weight' shares its weight with blocks\.1\.attention"):
        mask_layers(shared)
    computed = net()
    nn.utils.parametrizations.weight_norm(computed.blocks[0].attention, "in_proj_weight")
    with pytest.raises(ValueError, match=r"in_proj_weight' computes its weight from other parameters"):
        mask_layers(computed)
    frozen = net()
    frozen.blocks[0].attention.in_proj_weight.requires_grad_(False)
    assert "blocks.0.attention.in_proj_weight" not in mask_layers(frozen)
    assert "frozen layers stay unmasked: blocks.0.attention.in_proj_weight" in caplog.text
    parts = [torch.randn(3, WIDTH), torch.randn(2, WIDTH)]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged)
    with pytest.raises(ValueError, match=r"masked attention does not take nested tensors: nn\.Trans"):
        frozen.blocks[1].attention(nested, nested, nested)


@pytest.mark.parametrize("need_weights", [False, True])
def test_flops_are_those_of_the_plain_model_and_scale_with_density(need_weights):
    """16 places. need_weights: products by torch's function, not by layers."""
    model = net(need_weights=need_weights)
    plain = count_flops(model, (3, 16, 16))
    mask_layers(model)
    masked = count_flops(model, (3, 16, 16))
    assert [(each.name, each.products, each.bias) for each in masked.layers] == [
        (each.name, each.products, each.bias) for each in plain.layers
    ]
    assert [each.name for each in plain.layers] == NAMES
    attention = {each.name.rpartition(".")[2]: each for each in plain.layers[1:3]}
    assert (attention["in_proj_weight"].products, attention["in_proj_weight"].bias) == (
        2 * 16 * 3 * WIDTH**2,
        16 * 3 * WIDTH,
    )
    assert (attention["out_proj"].products, attention["out_proj"].bias) == (2 * 16 * WIDTH**2, 16 * WIDTH)
    assert plain.products == masked.products == 2 * (2 * 2 * 16 * 16 * WIDTH)
    half = {"blocks.1.attention.in_proj_weight": 0.5}
    assert masked.forward() - masked.forward(half) == 16 * 3 * WIDTH**2
    without = count_flops(net(need_weights=need_weights, bias=False), (3, 16, 16)).layers
    assert [each.bias for each in without[1:3]] == [0, 0]


def train(accelerate, compiled=False):
    """Losses of steps in a dense and a sparse phase, and the ACDC object."""
    model = net()
    acdc = ACDC(model, GlobalMagnitude(0.8), PhaseSchedule.parse("dense 1, sparse 1"), 2)
    acdc.attach(optimizer := torch.optim.SGD(model.parameters(), 0.05, 0.9))
    torch.manual_seed(5)
    images = torch.randn(4, 3, 16, 16)
    acdc.accelerate(accelerate, images)
    losses = []
    forward = torch.compile(model, backend="eager", dynamic=False) if compiled else model
    for _ in range(4):
        acdc.before_step()
        loss = forward(images).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, acdc


@pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")
def test_kernels_run_both_projections():
    dense, _ = train("off")
    sparse, acdc = train("require")
    assert set(acdc.kernels) == set(NAMES)
    assert sparse == pytest.approx(dense, rel=1e-4)
    assert sparse != dense
    acdc.check_masks()


@pytest.mark.slow
@pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")
def test_kernels_of_both_projections_cost_one_graph_more():
    dense, _ = train("off")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert train("require", compiled=True)[0] == pytest.approx(dense, rel=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "deit_tiny_patch16_224", "swin_tiny", "convnext_atto"]
)
def test_timms_transformers(name):
    """All of their matrices and convolutions are masked, and none is used past its mask."""
    import_torchvision()
    timm = pytest.importorskip("timm", reason="timm is not installed")
    sizes = {"img_size": 32, "depth": 2}
    if name == "swin_tiny":
        name, sizes = "swin_tiny_patch4_window7_224", {"img_size": 56, "depths": (1, 1, 1, 1)}
    elif name == "convnext_atto":
        sizes = {}
    model = timm.create_model(name, num_classes=5, **sizes)
    layers = mask_layers(model)
    masked = {id(layer.weight) for layer in layers.values()}
    left = [n for n, p in model.named_parameters() if id(p) not in masked and sum(s > 1 for s in p.shape) > 1]
    assert all("pos_embed" in each or "relative_position_bias" in each for each in left)
    x = torch.randn(1, 3, *[sizes.get("img_size", 32)] * 2)
    assert find_escaping(model, layers, x) == []
    for layer in layers.values():
        layer.mask.copy_(torch.rand(layer.mask.shape) > 0.5)
    torch.testing.assert_close(to_plain(model).eval()(x), model.eval()(x))
