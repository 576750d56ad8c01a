"""Which kernels there are, and which one each masked layer runs in compressed phases: given or chosen."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparsity.flops import count_flops
from sparsity.kernels.choose import NoKernelError, choose_kernels
from sparsity.kernels.interface import Kernel, KernelFamily, KernelUnavailableError
from sparsity.kernels.semi_structured import kernel as semi_structured
from sparsity.kernels.semi_structured.family import Family24
from sparsity.kernels.semi_structured.operator import missing
from sparsity.kernels.unstructured import kernel as unstructured
from sparsity.kernels.unstructured.family import SparseFamily
from sparsity.kernels.unstructured.library import BuildError, find_compiler, load
from sparsity.layers import with_unmasked_between
from sparsity.modules.layers import MaskedLayer
from sparsity.patterns import Pattern, Transposable24, is_24

log = logging.getLogger(__name__)


def kernel_named(name: str) -> Kernel | None:
    """The kernel of that name, or None where this version has none."""
    return semi_structured.from_name(name) or unstructured.from_name(name)


def kernel_names(state: Mapping[str, Any]) -> dict[str, str]:
    """Layer -> name of its kernel, in states of earlier versions, too."""
    return state.get("kernels", state.get("run24", {}))


def check_kernels(state: Mapping[str, Any]) -> None:
    """Raise ValueError where a training state names kernels that there are none of here."""
    unknown = {name for name in kernel_names(state).values() if kernel_named(name) is None}
    if unknown:
        names = ", ".join(sorted(unknown))
        raise ValueError(f"the saved run had kernels that this version does not have: {names}")


def family_for(pattern: Pattern, device: torch.device, dtype: torch.dtype) -> KernelFamily | str:
    """The kernels for masks of a pattern, or what this machine or precision misses for them, after "they
    need".

    Builds the CPU's kernels where that was not done before: some seconds.
    """
    if device.type == "cpu":
        if dtype not in unstructured.DTYPES.values():
            return "fp32 or bf16"
        if find_compiler() is None:
            return "a C++ compiler (g++ or clang++)"
        try:
            load()
        except BuildError as error:
            return f"a build of their C++ that works ({error})"
        return SparseFamily(dtype)
    if not is_24(pattern):
        return "a CPU, or a 2:4 pattern"
    needed = missing(device, dtype)
    return needed or Family24(device, dtype, isinstance(pattern, Transposable24))


def foreign_between(model: nn.Module, layers: Mapping[str, nn.Module]) -> str | None:
    """What a model misses whose kernels would have to change the memory format within, after "they need"; or
    None. A convolution of a kind of its own computes in torch's format: between others it costs a change both
    ways, and more than kernels gain where shortcuts then mix the two."""
    kinds = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d
    names = [name for name, layer in model.named_modules() if isinstance(layer, kinds) or name in layers]
    places = [place for place, name in enumerate(names) if name in layers]
    between = names[places[0] : places[-1]] if places else []
    foreign = [name for name in between if name not in layers]
    return f"plain torch.nn.Conv2d between them, and {', '.join(foreign[:3])} is none" if foreign else None


class Wish(NamedTuple):
    """Kernels to be chosen as soon as there are masks. shape: (images, channels, height, width) of a step on
    this device. required: take kernels wherever they are right, faster or not."""

    shape: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype
    required: bool

    @classmethod
    def of(cls, mode: str, example: Tensor | None) -> Wish | None:
        """None for "off". Raises ValueError for another mode than auto, off, require, and without example."""
        if mode not in ("auto", "off", "require"):
            raise ValueError(f"accelerate: {mode!r} is not one of auto, off, require")
        if mode == "off":
            return None
        if example is None:
            raise ValueError(f'accelerate("{mode}", example): an example batch says what to measure')
        kind = example.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else example.dtype
        return cls(tuple(example.shape), example.device, dtype, mode == "require")


class Execution:
    """layers: the masked ones and unmasked convolutions between them, in the model's order. kernels: of the
    layers that run one in compressed phases."""

    def __init__(self, model: nn.Module, masked: Mapping[str, MaskedLayer]) -> None:
        self.layers = with_unmasked_between(model, masked) if masked else {}
        self.kernels: dict[str, Kernel] = {}
        self.wish: Wish | None = None

    def set(self, kernels: Mapping[str, Kernel | None]) -> None:
        """Raises KeyError for another layer. Takes effect with `use`."""
        unknown = [name for name in kernels if name not in self.layers]
        if unknown:
            raise KeyError(f"not a masked layer: {', '.join(unknown)}")
        self.wish = None
        self.kernels = {
            name: kernel.of(self.layers[name]) for name, kernel in kernels.items() if kernel is not None
        }

    def set_named(self, names: Mapping[str, str]) -> None:
        """Layer -> name of its kernel, as a training state keeps them."""
        self.set({layer: kernel_named(name) for layer, name in names.items()})

    def fulfil(self, model: nn.Module, pattern: Pattern) -> None:
        """Choose what was wished for, by the masks in force. Raises NoKernelError where it is required."""
        if (wish := self.wish) is None:
            return
        family = family_for(pattern, wish.device, wish.dtype)
        if isinstance(family, SparseFamily) and not wish.required:
            family = foreign_between(model, self.layers) or family
        if isinstance(family, str):
            if wish.required:
                raise NoKernelError(f"kernels for {pattern} masks need {family}")
            log.warning(
                "compressed phases run masked dense layers: kernels for %s masks need %s", pattern, family
            )
            self.set({})
            return
        calls = {layer.name: layer.calls for layer in count_flops(model, wish.shape[1:]).layers}
        choices = choose_kernels(family, self.layers, calls, wish.shape[0], required=wish.required)
        self.set({choice.layer: choice.kernel for choice in choices})

    def use(self, compressed: bool) -> None:
        """Put the kernels to work, by the masks in force, or the dense product."""
        chosen = self._runnable() if compressed else {}
        for name, layer in self.layers.items():
            layer.kernel = chosen.get(name)
            try:
                if layer.kernel is not None:
                    layer.kernel.prepare(layer)
            except KernelUnavailableError as error:
                log.warning("layer %s runs dense: %s", name, error)
                layer.kernel = None
                del self.kernels[name]

    def _runnable(self) -> dict[str, Kernel]:
        """self.kernels as far as the masks in force allow: those of another pattern may be (a run resumed
        with one) what a kernel would compute wrongly."""
        if not self.kernels:
            return {}
        pairs = [(name, each) for name, kernel in self.kernels.items() for each in kernel.chain()]
        fits = torch.stack([kernel.fits(self.layers[name].mask) for name, kernel in pairs]).tolist()
        allowed: dict[str, Kernel] = {}
        for (name, kernel), right in zip(pairs, fits, strict=True):
            if right:
                allowed.setdefault(name, kernel)
        for name, kernel in self.kernels.items():
            if name not in allowed:
                log.warning("layer %s runs dense: its mask does not fit the kernel %r", name, kernel.name)
        return allowed
