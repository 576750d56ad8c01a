import copy

import pytest
import torch
from torch import nn
from torch.optim import swa_utils

from sparsity import (
    ACDC,
    AveragedModel,
    GlobalMagnitude,
    MaskedConv2d,
    MaskedLinear,
    PhaseSchedule,
    mask_layers,
    to_plain,
)
from sparsity.layers import UnmaskableError


def small_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10)
    )


def test_conversion_is_in_place_and_keeps_parameters_and_names():
    net = small_net()
    names, parameters, layer = [n for n, _ in net.named_parameters()], list(net.parameters()), net[0]
    masked = mask_layers(net)
    assert list(masked) == ["0", "4"]
    assert [n for n, _ in net.named_parameters()] == names
    assert all(a is b for a, b in zip(net.parameters(), parameters, strict=True))
    assert net[0] is layer
    assert isinstance(net[0], MaskedConv2d)
    assert isinstance(net[4], MaskedLinear)
    assert net[0].mask.dtype == torch.bool
    assert net[0].mask.all()
    assert {name for name in net.state_dict() if "mask" in name} == {"0.mask", "4.mask"}


def test_dropped_weights_neither_act_nor_learn():
    net = small_net().eval()
    x = torch.randn(2, 1, 8, 8)
    mask_layers(net)
    keep = torch.rand_like(net[0].weight) > 0.5
    net[0].mask.copy_(keep)
    changed = net(x)
    with torch.no_grad():
        net[0].weight.add_(~keep * 5.0)
    assert torch.equal(net(x), changed)
    net(x).sum().backward()
    assert (net[0].weight.grad[~keep] == 0).all()
    assert (net[0].weight.grad[keep] != 0).any()


def test_to_plain_has_neither_masks_nor_wrappers_and_computes_the_same():
    net = small_net().eval()
    mask_layers(net)
    net[4].mask[:, ::3] = False
    plain, x = to_plain(net), torch.randn(2, 1, 8, 8)
    assert type(plain[0]) is nn.Conv2d
    assert type(plain[4]) is nn.Linear
    assert list(plain.state_dict()) == list(small_net().state_dict())
    assert (plain[4].weight[:, ::3] == 0).all()
    assert torch.equal(plain(x), net(x))
    assert isinstance(net[4], MaskedLinear)


def test_include_and_exclude_choose_by_name():
    net = nn.ModuleDict({"stem": nn.Conv2d(3, 4, 1), "body": small_net(), "head": nn.Linear(4, 2)})
    assert list(mask_layers(net, include=["body.*", "head"], exclude=["*.4"])) == ["body.0", "head"]
    assert type(net["stem"]) is nn.Conv2d


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"include": ["layer1.*"]}, "include pattern 'layer1.\\*' matches no convolution or linear layer"),
        ({"exclude": ["body.44"]}, "exclude pattern 'body.44' matches no .* did you mean 'body.4'"),
        ({"exclude": ["*"]}, "no layer is left to mask"),
        ({"include": "body.4"}, "include is a list of patterns"),
    ],
)
def test_a_pattern_that_chooses_nothing_is_an_error_and_changes_nothing(arguments, message):
    net = nn.ModuleDict({"body": small_net()})
    with pytest.raises(ValueError, match=message):
        mask_layers(net, **arguments)
    assert not any(isinstance(module, MaskedConv2d | MaskedLinear) for module in net.modules())


class OwnConv(nn.Conv2d):
    def forward(self, input):
        return self._conv_forward(input, self.weight - self.weight.mean(), self.bias)


class Initialised(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        nn.init.normal_(self.weight)

    def extra_repr(self):
        return "initialised"


def test_layers_that_might_bypass_the_mask_are_refused_by_name():
    net = nn.ModuleDict({"body": nn.Sequential(OwnConv(1, 1, 1), nn.Linear(2, 2), OwnConv(1, 1, 1))})
    with pytest.raises(
        UnmaskableError, match=r"layer 'body.0' is a \S*OwnConv.*exclude=\['\*.0', '\*.2'\]"
    ) as error:
        mask_layers(net)
    assert list(mask_layers(net, exclude=error.value.exclude)) == ["body.1"]


def test_subclasses_that_compute_as_their_base_are_masked_and_come_back_as_they_were():
    kinds = (Initialised, nn.modules.linear.NonDynamicallyQuantizableLinear)
    net = nn.Sequential(*(kind(4, 4) for kind in kinds))
    masked = mask_layers(net)
    assert [type(layer) for layer in masked.values()] == [MaskedLinear, MaskedLinear]
    net[0].mask[:2] = False
    plain, x = to_plain(net), torch.randn(3, 4)
    assert tuple(map(type, plain)) == kinds
    assert torch.equal(plain(x), net(x))
    assert "plain_class" not in vars(plain[0])


@pytest.fixture
def timm_layers():
    from data.torchvision_import import import_torchvision

    import_torchvision()
    return pytest.importorskip("timm.layers", reason="pip install 'acdc-train[timm]'")


def test_timms_subclasses(timm_layers):
    shapes = [(3, 2, 1, 1), ((5, 3), (1, 3), 1, 1), (3, 2, 2, 4), (1, 3, 1, 1), (2, 3, 1, 1)]
    for kernel, stride, dilation, groups in shapes:
        conv = timm_layers.Conv2dSame(4, 8, kernel, stride, dilation=dilation, groups=groups)
        net = nn.Sequential(conv)
        for size in ((7, 10), (12, 9), (5, 5)):
            x = torch.randn(2, 4, *size)
            expected = conv(x)
            masked = mask_layers(copy.deepcopy(net))["0"]
            assert torch.equal(masked(x), expected)
            masked.mask[::2] = False
            plain = to_plain(masked)
            assert type(plain) is timm_layers.Conv2dSame
            assert torch.equal(plain(x), masked(x))
            assert not torch.equal(plain(x), expected)
    net = nn.Sequential(timm_layers.Linear(4, 4))
    assert list(mask_layers(net)) == ["0"]
    assert type(to_plain(net)[0]) is timm_layers.Linear
    for kind in (timm_layers.StdConv2d, timm_layers.ScaledStdConv2dSame):
        with pytest.raises(UnmaskableError, match=rf"is a timm\S+{kind.__name__}, a kind of its own"):
            mask_layers(nn.Sequential(kind(4, 4, 3)))


def test_no_kernel_runs_a_layer_that_pads_by_size(timm_layers):
    same = timm_layers.Conv2dSame
    net = nn.Sequential(same(4, 4, 3, 2), nn.Conv2d(4, 4, 3), same(4, 4, 3))
    acdc = ACDC(net, GlobalMagnitude(0.9), PhaseSchedule.parse("sparse 1"), 2)
    assert list(acdc.kernel_layers) == ["1"]
    only = nn.Sequential(same(4, 4, 3))
    assert ACDC(only, GlobalMagnitude(0.5), PhaseSchedule.parse("sparse 1"), 2).kernel_layers == {}


def test_shared_weights_and_second_conversions_are_refused():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    with pytest.raises(ValueError, match=r"'0' shares its weight with 1.weight"):
        mask_layers(net)
    twice = nn.Sequential(nn.Linear(4, 4))
    mask_layers(twice)
    with pytest.raises(ValueError, match="masked already"):
        mask_layers(twice)


def exponential(mean, now, count):
    return 0.9 * mean + 0.1 * now


@pytest.mark.parametrize("use_buffers", [True, False])
@pytest.mark.parametrize(
    "average",
    [{}, {"avg_fn": exponential}, {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.9)}],
    ids=["mean", "avg_fn", "multi_avg_fn"],
)
def test_averaged_models_keep_the_masks_in_force_and_average_all_else(average, use_buffers):
    """Over both kinds of phases; the rest as torch's own, of the same model without masks."""
    net = small_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    acdc = ACDC(net, GlobalMagnitude(0.9), PhaseSchedule.parse("(dense 1, sparse 1) x2, dense 1"), 2)
    acdc.attach(optimizer)
    ours = AveragedModel(net, use_buffers=use_buffers, **average)
    reference = average or {"avg_fn": swa_utils.get_swa_avg_fn()}  # its default fails over BatchNorm's count
    theirs = swa_utils.AveragedModel(to_plain(net), use_buffers=use_buffers, **reference)
    for _ in range(10):
        acdc.before_step()
        net(torch.randn(4, 1, 8, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ours.update_parameters(net)
        theirs.update_parameters(to_plain(net))
        state, expected = ours.state_dict(), theirs.state_dict()
        for name, mask in acdc.masks().items():
            assert torch.equal(state.pop(f"module.{name}.mask"), mask)
        expected["module.1.num_batches_tracked"] = net[1].num_batches_tracked
        assert state.keys() == expected.keys()
        for name, value in state.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
    assert type(to_plain(ours).module[0]) is nn.Conv2d
