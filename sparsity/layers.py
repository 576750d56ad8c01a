"""Layers that multiply their weight by a keep-mask, and how a model's layers are chosen and converted.

A converted layer keeps its identity, its parameters and their names; it gains one persistent boolean buffer,
`mask` (True: kept), of the weight's shape. The mask is all ones in dense phases and is only ever updated in
place: the forward pass has no branch on the phase, so a compiled graph stays valid over phase switches, and
autograd multiplies the weight's gradient by the mask.
"""

from __future__ import annotations

import copy
import difflib
import fnmatch
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parameter import is_lazy
from torch.optim import swa_utils

from sparsity.kernels.interface import Kernel

log = logging.getLogger(__name__)


class _RunsKernel(nn.Module):
    """In training, what `kernel` says computes, else the dense product. Evaluation is always dense, so that
    switching costs one further graph, not two."""

    mask: Tensor
    kernel: Kernel | None
    dense: Callable[[Tensor], Tensor]

    def forward(self, input: Tensor) -> Tensor:
        if self.training and self.kernel is not None:
            return self.kernel(self, input)
        return self.dense(input)

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script asks for."""
        raise ValueError(
            "torch.jit.script does not take masked layers: script acdc.export(), a copy without masks, or "
            "use torch.compile on the model itself"
        )

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        if self.kernel is not None:
            self.kernel.prepare(self)  # the mask may be another


class MaskedConv2d(_RunsKernel, nn.Conv2d):
    """Conv2d of weight * mask. `mask`: bool, (out, in / groups, kh, kw)."""

    weight: nn.Parameter

    def dense(self, input: Tensor) -> Tensor:
        """With weight * mask."""
        return self._conv_forward(input, self.weight * self.mask, self.bias)


class MaskedLinear(_RunsKernel, nn.Linear):
    """Linear of weight * mask. `mask`: bool, (out_features, in_features)."""

    weight: nn.Parameter

    def dense(self, input: Tensor) -> Tensor:
        """With weight * mask."""
        return functional.linear(input, self.weight * self.mask, self.bias)


class UnmaskedConv2d(_RunsKernel, nn.Conv2d):
    """Conv2d between masked ones: it may compute in their kernels' memory format. `mask`: all ones, not
    kept."""

    dense = nn.Conv2d.forward

    @property
    def mask(self) -> Tensor:  # type: ignore[override]
        return torch.ones_like(self.weight, dtype=torch.bool)


class MaskedConv2dSame(MaskedConv2d):
    """As timm's Conv2dSame, which pads its input by its size, as TensorFlow does. No kernel does that."""

    def dense(self, input: Tensor) -> Tensor:
        pads: list[int] = []
        for side in (1, 0):  # functional.pad begins with the last dimension
            stride, reach = self.stride[side], self.dilation[side] * (self.kernel_size[side] - 1) + 1
            size = input.shape[2 + side]
            missing = max((math.ceil(size / stride) - 1) * stride + reach - size, 0)
            pads += [missing // 2, missing - missing // 2]
        return super().dense(functional.pad(input, pads))


MaskedLayer = MaskedConv2d | MaskedLinear
_MASKED: dict[type[nn.Module], type[MaskedLayer]] = {nn.Conv2d: MaskedConv2d, nn.Linear: MaskedLinear}
# Subclasses with a forward pass of their own that is known
_KNOWN: dict[str, type[MaskedLayer]] = {
    "timm.layers.conv2d_same.Conv2dSame": MaskedConv2dSame,
    "timm.layers.linear.Linear": MaskedLinear,
}
_PLAIN: dict[type[nn.Module], type[nn.Module]] = {
    UnmaskedConv2d: nn.Conv2d,
    **{masked: plain for plain, masked in _MASKED.items()},
}


class UnmaskableError(ValueError):
    """Of chosen layers whose kind masks do not know. exclude: patterns that leave all of them dense."""

    def __init__(self, reason: str, exclude: list[str]) -> None:
        super().__init__(f"{reason}; leave dense what is of such kinds: exclude={exclude}")
        self.reason, self.exclude = reason, exclude


def mask_layers(
    model: nn.Module, include: Iterable[str] = ("*",), exclude: Iterable[str] = ()
) -> dict[str, MaskedLayer]:
    """Convert the chosen layers of `model` in place and return them by name, in the model's order.

    include, exclude: shell-style patterns over the names of the model's Conv2d and Linear layers ("layer1.*",
    "*.downsample.0", "fc"); chosen is what any include pattern matches and no exclude pattern does, without
    frozen layers (requires_grad False), which cannot regain what a mask drops: a warning names them. Raises
    ValueError, and converts nothing, for a pattern that matches no layer, when no layer is left, and for a
    chosen layer whose weight a mask in its forward pass would not hold: of a subclass of Conv2d or Linear
    that computes otherwise (UnmaskableError), masked already, computed from other parameters (weight_norm,
    spectral_norm, parametrizations), or shared with anything else in the model.
    """
    layers = {
        name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)
    }
    chosen = {name: layers[name] for name in choose(list(layers), include, exclude)}
    users = _users_of_tensors(model)
    unknown = _unmaskable_kinds(model, chosen)
    for name, layer in chosen.items():
        if (reason := _reason_unmaskable(layer)) is not None:
            raise ValueError(f"layer {name!r} {reason}")
        if name in unknown:
            raise UnmaskableError(f"layer {name!r} {unknown[name]}", patterns_of(list(unknown), list(layers)))
        if others := [user for user in users[_place(layer.weight)] if user != f"{name}.weight"]:
            raise ValueError(
                f"layer {name!r} shares its weight with {', '.join(others)}, past the mask; exclude it"
            )
    if frozen := [name for name, layer in chosen.items() if not layer.weight.requires_grad]:
        log.warning("frozen layers stay unmasked: %s", _shorten(frozen))
        chosen = {name: layer for name, layer in chosen.items() if name not in frozen}
        if not chosen:
            raise ValueError("no layer is left to mask: all that are chosen are frozen (requires_grad False)")
    masked: dict[str, MaskedLayer] = {}
    for name, layer in chosen.items():
        layer.register_buffer("mask", torch.ones_like(layer.weight, dtype=torch.bool, requires_grad=False))
        if type(layer) not in _MASKED:
            vars(layer)["plain_class"] = type(layer)
        _become(layer, _masked_kind(type(layer)))
        assert isinstance(layer, MaskedLayer)
        layer.kernel = None  # from the beginning: compiled code looks at which attributes there are
        masked[name] = layer
    return masked


def with_unmasked_between(
    model: nn.Module, masked: Mapping[str, MaskedLayer]
) -> dict[str, MaskedLayer | UnmaskedConv2d]:
    """The masked layers, and the plain convolutions between the first and the last of them in the model's
    order, which are converted in place to UnmaskedConv2d."""
    masked = {name: layer for name, layer in masked.items() if not isinstance(layer, MaskedConv2dSame)}
    if not masked:
        return {}
    names = [name for name, layer in model.named_modules() if name in masked or type(layer) is nn.Conv2d]
    places = [place for place, name in enumerate(names) if name in masked]
    layers: dict[str, Any] = {name: model.get_submodule(name) for name in names[places[0] : places[-1] + 1]}
    for name, layer in layers.items():
        if name not in masked:
            _become(layer, UnmaskedConv2d)
            layer.kernel = None
    return layers


def _reason_unmaskable(layer: nn.Conv2d | nn.Linear) -> str | None:
    """What makes a mask in the layer's forward pass fail, after "layer NAME"; or None."""
    if is_sharded(layer.weight):
        return "is sharded by FSDP, and masks are chosen over whole weights: use DDP or ZeRO 0 to 2"
    if isinstance(layer, MaskedLayer):
        return "is masked already; one ACDC object owns a layer"
    if "weight" not in dict(layer.named_parameters(recurse=False)):
        return (
            "computes its weight from other parameters (weight_norm, spectral_norm or another "
            "parametrization), past the mask; remove that before, or exclude the layer"
        )
    return None


def _unmaskable_kinds(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Layer -> why no mask is known for its kind, after "layer NAME"."""
    projections = [each.out_proj for each in model.modules() if isinstance(each, nn.MultiheadAttention)]
    reasons = {}
    for name, layer in layers.items():
        if any(layer is projection for projection in projections):
            reasons[name] = "belongs to torch.nn.MultiheadAttention, which uses its weight past the mask"
        elif _masked_kind(type(layer)) is None:
            kind = f"{type(layer).__module__}.{type(layer).__name__}"
            reasons[name] = f"is a {kind}, a kind of its own that may use its weight past the mask"
    return reasons


def _masked_kind(kind: type[nn.Module]) -> Any:
    """The masked class for layers of `kind`, or None: for what computes otherwise than Conv2d and Linear."""
    if known := _KNOWN.get(f"{kind.__module__}.{kind.__qualname__}"):
        return known
    base = next(each for each in _MASKED if issubclass(kind, each))
    own = {name for each in kind.__mro__ if each not in base.__mro__ for name in vars(each)}
    harmless = {name for name in own if name.startswith("__")} - {
        "__call__",
        "__getattr__",
        "__getattribute__",
    }
    return _MASKED[base] if own <= harmless | {"reset_parameters", "extra_repr"} else None


def patterns_of(names: list[str], layers: list[str]) -> list[str]:
    """Short patterns that match all of `names` and no other of `layers`."""

    def pattern(name: str) -> str:
        parts = name.split(".")
        endings = ("*." + ".".join(parts[-count:]) for count in range(1, len(parts)))
        return next((end for end in endings if set(fnmatch.filter(layers, end)) <= set(names)), name)

    return list(dict.fromkeys(map(pattern, names)))


def is_sharded(weight: Tensor) -> bool:
    """Whether a rank has only its part of it: a DTensor."""
    return hasattr(weight, "full_tensor")


def _users_of_tensors(model: nn.Module) -> dict[int, list[str]]:
    """Place in memory -> names of the parameters and buffers that begin there."""
    users: dict[int, list[str]] = defaultdict(list)
    for prefix, module in model.named_modules():
        for name, tensor in (*module.named_parameters(prefix, False), *module.named_buffers(prefix, False)):
            users[_place(tensor)].append(name)
    return users


def _place(tensor: Tensor) -> int:
    if is_lazy(tensor) or tensor.layout is not torch.strided or tensor.is_meta:
        return id(tensor)
    return tensor.data_ptr() or id(tensor)


def choose(names: list[str], include: Iterable[str], exclude: Iterable[str]) -> list[str]:
    """The names that an include pattern matches and no exclude pattern does, in their order."""
    include, exclude = _patterns(include, "include"), _patterns(exclude, "exclude")
    for role, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
                near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.5)
                hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
                raise ValueError(
                    f"{role} pattern {pattern!r} matches no convolution or linear layer{hint}\n"
                    f"the model's layers: {_shorten(names)}"
                )
    chosen = [
        name
        for name in names
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in include)
        and not any(fnmatch.fnmatchcase(name, pattern) for pattern in exclude)
    ]
    if not chosen:
        raise ValueError(f"no layer is left to mask: include {include}, exclude {exclude}")
    return chosen


def to_plain(model: nn.Module) -> nn.Module:
    """A deep copy of the model as it was before mask_layers: masks multiplied into the weights, no mask
    buffers, the plain layer classes."""
    plain = copy.deepcopy(model)
    for layer in plain.modules():
        if isinstance(layer, MaskedLayer):
            layer.weight.detach().mul_(layer.mask)
            del layer.mask
        if isinstance(layer, _RunsKernel):
            vars(layer).pop("kernel", None)
            _become(layer, vars(layer).pop("plain_class", None) or _PLAIN[type(layer)])
    return plain


class AveragedModel(swa_utils.AveragedModel):
    """torch's, of a masked model. With use_buffers=True masks and counts are those of the model as it is;
    torch's own averages True and False, or fails. (Without use_buffers it copies all buffers.)"""

    def __init__(self, model: nn.Module, *arguments: Any, **keywords: Any) -> None:
        super().__init__(model, *arguments, **keywords)
        if self.use_buffers and (average := self.avg_fn) is not None:
            self.avg_fn = lambda mean, now, n: average(mean, now, n) if now.is_floating_point() else now
        elif self.use_buffers:
            self.multi_avg_fn = _of_floats(self.multi_avg_fn or swa_utils.get_swa_multi_avg_fn())  # type: ignore[no-untyped-call]


def _of_floats(average: Callable[..., None]) -> Callable[..., None]:
    """`average` of lists of tensors, in place; tensors of other types become what they are in the second."""

    def average_(means: list[Tensor], now: list[Tensor], count: Tensor | int) -> None:
        if means[0].is_floating_point():
            average(means, now, count)
        else:
            torch._foreach_copy_(means, now)

    return average_


def _become(layer: nn.Module, kind: type[nn.Module]) -> None:
    """Change a layer's class in place: hooks, parameters and everybody's references to it stay."""
    layer.__class__ = kind


def _patterns(patterns: Iterable[str], role: str) -> list[str]:
    if isinstance(patterns, str):
        raise ValueError(f"{role} is a list of patterns, not one text: [{patterns!r}]")
    return list(patterns)


def _shorten(names: list[str], most: int = 30) -> str:
    more = f", ... ({len(names)} in all)" if len(names) > most else ""
    return ", ".join(names[:most]) + more
