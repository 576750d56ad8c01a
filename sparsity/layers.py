"""How a model's layers are chosen and converted to masked ones, see sparsity.modules, and back.

A converted layer keeps its identity, its parameters and their names; it gains one persistent boolean buffer,
`mask`.
"""

from __future__ import annotations

import copy
import difflib
import fnmatch
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import swa_utils

from sparsity.modules.attention import InProjection, MaskedAttention, become_masked
from sparsity.modules.layers import (
    MaskedConv2d,
    MaskedConv2dSame,
    MaskedLayer,
    MaskedLinear,
    RunsKernel,
    UnmaskedConv2d,
)

log = logging.getLogger(__name__)

_MASKED: dict[type[nn.Module], type[MaskedLayer]] = {nn.Conv2d: MaskedConv2d, nn.Linear: MaskedLinear}
# Subclasses with a forward pass of their own that is known
_KNOWN: dict[str, type[MaskedLayer]] = {
    "timm.layers.conv2d_same.Conv2dSame": MaskedConv2dSame,
    "timm.layers.linear.Linear": MaskedLinear,
}
_KINDS: dict[type[nn.Module], type[nn.Module]] = {**_MASKED, nn.MultiheadAttention: MaskedAttention}
_PLAIN: dict[type[nn.Module], type[nn.Module]] = {
    UnmaskedConv2d: nn.Conv2d,
    **{masked: plain for plain, masked in _MASKED.items()},
}


class UnmaskableError(ValueError):
    """Of chosen layers whose kind masks do not know. exclude: patterns that leave all of them dense."""

    def __init__(self, reason: str, exclude: list[str]) -> None:
        super().__init__(f"{reason}; leave dense what is of such kinds: exclude={exclude}")
        self.reason, self.exclude = reason, exclude


class Maskable(NamedTuple):
    """A weight that may get a mask: of a Conv2d, a Linear, or the input projection of attention, whose layer
    is the attention. parameter: its name there. key: in the model."""

    layer: nn.Module
    parameter: str
    key: str

    @property
    def weight(self) -> nn.Parameter:
        return getattr(self.layer, self.parameter)


def maskable(model: nn.Module) -> dict[str, Maskable]:
    """By the names that patterns choose from, in the model's order: a layer's, and "NAME.in_proj_weight" in
    attention, where query, key and value have one width."""
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.MultiheadAttention) and layer._qkv_same_embed_dim:
            key = f"{name}.in_proj_weight".lstrip(".")
            found[key] = Maskable(layer, "in_proj_weight", key)
        elif isinstance(layer, nn.Conv2d | nn.Linear) and not isinstance(layer, InProjection):
            found[name] = Maskable(layer, "weight", f"{name}.weight".lstrip("."))
    return found


def mask_layers(
    model: nn.Module, include: Iterable[str] = ("*",), exclude: Iterable[str] = ()
) -> dict[str, MaskedLayer]:
    """Convert the chosen layers of `model` in place and return them by name, in the model's order.

    include, exclude: shell-style patterns over the names of the model's Conv2d and Linear layers ("layer1.*",
    "*.downsample.0", "fc") and of torch.nn.MultiheadAttention's input projections ("*.in_proj_weight");
    chosen is what any include pattern matches and no exclude pattern does, without frozen layers
    (requires_grad False), which cannot regain what a mask drops: a warning names them. Raises ValueError, and
    converts nothing, for a pattern that matches no layer, when no layer is left, and for a chosen layer whose
    weight a mask in its forward pass would not hold: of a subclass of Conv2d, Linear or MultiheadAttention
    that computes otherwise (UnmaskableError), masked already, computed from other parameters (weight_norm,
    spectral_norm, parametrizations), or shared with anything else in the model.
    """
    layers = maskable(model)
    chosen = {name: layers[name] for name in choose(list(layers), include, exclude)}
    users = _users_of_tensors(model)
    unknown = _unmaskable_kinds(model, chosen)
    for name, each in chosen.items():
        if (reason := _reason_unmaskable(each)) is not None:
            raise ValueError(f"layer {name!r} {reason}")
        if name in unknown:
            raise UnmaskableError(f"layer {name!r} {unknown[name]}", patterns_of(list(unknown), list(layers)))
        if others := [user for user in users[_place(each.weight)] if user != each.key]:
            raise ValueError(
                f"layer {name!r} shares its weight with {', '.join(others)}, past the mask; exclude it"
            )
    if frozen := [name for name, each in chosen.items() if not each.weight.requires_grad]:
        log.warning("frozen layers stay unmasked: %s", _shorten(frozen))
        chosen = {name: each for name, each in chosen.items() if name not in frozen}
        if not chosen:
            raise ValueError("no layer is left to mask: all that are chosen are frozen (requires_grad False)")
    owners = _attention_of(model)
    masked: dict[str, MaskedLayer] = {}
    for name, each in chosen.items():
        attention = owners.get(id(each.layer))
        if attention is not None and not isinstance(attention, MaskedAttention):
            become_masked(attention)
        masked[name] = _masked(each)
    return masked


def _masked(chosen: Maskable) -> MaskedLayer:
    """The layer, converted in place, or the new one of attention's input projection."""
    layer: Any = chosen.layer
    if isinstance(layer, MaskedAttention):
        layer.in_proj = layer = InProjection(layer)
    elif type(layer) not in _MASKED:
        vars(layer)["plain_class"] = type(layer)
    layer.register_buffer("mask", torch.ones_like(chosen.weight, dtype=torch.bool, requires_grad=False))
    if not isinstance(layer, InProjection):
        _become(layer, _masked_kind(type(layer)))
    layer.kernel = None  # from the beginning: compiled code looks at which attributes there are
    assert isinstance(layer, MaskedLayer)
    return layer


def with_unmasked_between(
    model: nn.Module, masked: Mapping[str, MaskedLayer]
) -> dict[str, MaskedLayer | UnmaskedConv2d]:
    """The masked layers, and the plain convolutions between the first and the last of them in the model's
    order, which are converted in place to UnmaskedConv2d."""
    names = {id(layer): name for name, layer in masked.items() if not isinstance(layer, MaskedConv2dSame)}
    if not names:
        return {}
    found: dict[str, Any] = {
        names.get(id(layer), name): layer
        for name, layer in model.named_modules()
        if id(layer) in names or type(layer) is nn.Conv2d
    }
    places = [place for place, layer in enumerate(found.values()) if id(layer) in names]
    layers = dict(list(found.items())[places[0] : places[-1] + 1])
    for layer in layers.values():
        if id(layer) not in names:
            _become(layer, UnmaskedConv2d)
            layer.kernel = None
    return layers


def _attention_of(model: nn.Module) -> dict[int, nn.MultiheadAttention]:
    """id of a module -> the MultiheadAttention that uses its weights: itself and its output projection."""
    owners: dict[int, nn.MultiheadAttention] = {}
    for each in model.modules():
        if isinstance(each, nn.MultiheadAttention):
            owners |= {id(each): each, id(each.out_proj): each}
    return owners


def _reason_unmaskable(chosen: Maskable) -> str | None:
    """What makes a mask in the layer's forward pass fail, after "layer NAME"; or None."""
    if is_sharded(chosen.weight):
        return "is sharded by FSDP, and masks are chosen over whole weights: use DDP or ZeRO 0 to 2"
    attention = chosen.layer if isinstance(chosen.layer, MaskedAttention) else None
    if isinstance(chosen.layer, MaskedLayer) or (attention is not None and attention.in_proj is not None):
        return "is masked already; one ACDC object owns a layer"
    if chosen.parameter not in dict(chosen.layer.named_parameters(recurse=False)):
        return (
            "computes its weight from other parameters (weight_norm, spectral_norm or another "
            "parametrization), past the mask; remove that before, or exclude the layer"
        )
    return None


def _unmaskable_kinds(model: nn.Module, layers: Mapping[str, Maskable]) -> dict[str, str]:
    """Layer -> why no mask is known for its kind, after "layer NAME"."""
    owners = _attention_of(model)
    reasons = {}
    for name, (layer, *_) in layers.items():
        attention = owners.get(id(layer), layer)
        for each in (attention, layer):
            if type(each) is not MaskedAttention and _masked_kind(type(each)) is None:
                kind = f"{type(each).__module__}.{type(each).__name__}"
                verb = "is" if each is layer and isinstance(layer, nn.Conv2d | nn.Linear) else "belongs to"
                reasons[name] = f"{verb} a {kind}, a kind of its own that may use its weight past the mask"
    return reasons


def _masked_kind(kind: type[nn.Module]) -> Any:
    """The masked class for layers of `kind`, or None: for what computes otherwise than its base."""
    if known := _KNOWN.get(f"{kind.__module__}.{kind.__qualname__}"):
        return known
    base = next(each for each in _KINDS if issubclass(kind, each))
    own = {name for each in kind.__mro__ if each not in base.__mro__ for name in vars(each)}
    calling = {"__call__", "__getattr__", "__getattribute__"}
    harmless = {name for name in own if name.startswith("__")} - calling
    return _KINDS[base] if own <= harmless | {"reset_parameters", "extra_repr"} else None


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
    for layer in list(plain.modules()):
        if isinstance(layer, MaskedLayer):
            layer.weight.detach().mul_(layer.mask)
            del layer.mask
        if isinstance(layer, MaskedAttention):
            del layer.in_proj
        if isinstance(layer, MaskedAttention | RunsKernel) and not isinstance(layer, InProjection):
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
