"""A finished sparse model on sparse CPU kernels, where they win, with BatchNorm folded."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from sparsity.flops import Call
from sparsity.inference.file import read
from sparsity.inference.graph import dense_beside, fold_batch_norm, join, take_in
from sparsity.kernels.choose import choose_kernels
from sparsity.kernels.interface import Kernel, KernelUnavailableError
from sparsity.kernels.unstructured.family import SparseFamily
from sparsity.kernels.unstructured.frozen import FrozenKernel
from sparsity.kernels.unstructured.kernel import DENSE_INNERMOST, SparseKernel
from sparsity.kernels.unstructured.library import BuildError

log = logging.getLogger(__name__)


class _Sparse(nn.Module):
    """A layer on a kernel, with weights that stay."""

    kernel: Kernel

    def forward(self, input: Tensor, *behind: Any) -> Tensor:
        """behind: what FrozenKernel takes, besides."""
        output: Tensor = self.kernel(self, input, *behind)
        return output

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a saved layer, whose kernel comes without its plan; where none can be made it runs dense."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        try:
            self.kernel.prepare(self)
        except KernelUnavailableError as error:
            log.warning("a sparse layer runs dense: %s", error)


class SparseConv2d(_Sparse, nn.Conv2d):
    dense = nn.Conv2d.forward


class SparseLinear(_Sparse, nn.Linear):
    dense = nn.Linear.forward


def load(path: str | Path, model: nn.Module, example: Tensor) -> nn.Module:
    """The model for inference on a CPU, with the weights of a file of `acdc export --format sparse`.

    model: of the architecture that was trained; it is left as it is. example: a batch as it will get them,
    normalised as in training; its size says what is measured, others work, too. Compile the result for its
    full speed, run it under torch.no_grad(), in torch.autocast for bf16 if this was called in it. Raises
    ValueError for another file, and RuntimeError for the weights of another architecture.
    """
    model = copy.deepcopy(model)
    model.load_state_dict(read(Path(path)))
    return accelerated(model, example)


def accelerated(model: nn.Module, example: Tensor) -> nn.Module:
    """The same for a model in memory: a copy."""
    model = fold_batch_norm(copy.deepcopy(model).eval())
    autocast = torch.is_autocast_enabled("cpu")
    family = SparseFamily(torch.get_autocast_dtype("cpu") if autocast else torch.float32, inference=True)
    layers = {name: layer for name, layer in model.named_modules() if type(layer) in (nn.Conv2d, nn.Linear)}
    calls = _calls(model, layers, example[:1])
    try:
        choices = choose_kernels(family, layers, calls, len(example))
    except BuildError as error:
        log.warning("the model runs dense: sparse kernels need a build of their C++ that works (%s)", error)
        choices = []
    for choice in choices:
        if choice.kernel is not None:
            _run(layers[choice.layer], choice.kernel)
    if isinstance(model, GraphModule):
        for name in dense_beside(model, SparseConv2d):
            _run(layers[name], DENSE_INNERMOST)
        take_in(model, _is_frozen)
        join(model, lambda layer: isinstance(layer, nn.Conv2d) and _is_frozen(layer))
    channels_last: nn.Module = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return channels_last


@torch.no_grad()
def _calls(model: nn.Module, layers: Mapping[str, nn.Module], image: Tensor) -> dict[str, list[Call]]:
    """Of each layer that the model runs for one image."""
    calls: dict[str, list[Call]] = {}

    def note(
        name: str, layer: nn.Module, inputs: tuple[Tensor], named: dict[str, Tensor], output: Tensor
    ) -> None:
        calls.setdefault(name, []).append(Call.of(layer, (*inputs, *named.values())[0], output))

    hooks = [
        layer.register_forward_hook(partial(note, name), with_kwargs=True) for name, layer in layers.items()
    ]
    model(image)
    for hook in hooks:
        hook.remove()
    return calls


def _is_frozen(layer: nn.Module) -> bool:
    return isinstance(layer, _Sparse) and isinstance(layer.kernel, FrozenKernel)


def _run(layer: nn.Conv2d | nn.Linear, kernel: Kernel) -> None:
    """Change the layer's class in place: its parameters and names stay."""
    if isinstance(kernel, SparseKernel):
        kernel = FrozenKernel(kernel.tiles, kernel.dtype)
    kernel.prepare(layer)
    become: Any = layer
    become.kernel = kernel
    become.__class__ = SparseConv2d if isinstance(layer, nn.Conv2d) else SparseLinear
