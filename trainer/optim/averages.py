"""Exponential moving averages of a model's weights (EMA), with the masks that the model has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sparsity import ACDC


class Averages:
    """After every optimizer step average = decay * average + (1 - decay) * value, of parameters and of
    floating-point buffers (BatchNorm statistics): the law of timm's ModelEmaV3 without its warm-up. What is
    dropped is 0 in the averages, too: they are masked at each compression, and both stay 0 from there.

    Begins as a copy of the model as it is now. All ranks average the same weights; statistics are each rank's
    own until they evaluate.
    """

    def __init__(self, acdc: ACDC, decay: float) -> None:
        self._acdc, self._decay = acdc, decay
        model = acdc.model
        self._parameters = dict(model.named_parameters())
        self._buffers = {name: b for name, b in model.named_buffers() if b.is_floating_point()}
        self._live: list[Tensor] = [*self._parameters.values(), *self._buffers.values()]
        self._averages = [value.detach().clone() for value in self._live]

    @torch.no_grad()
    def update(self) -> None:
        """Call after every optimizer step."""
        torch._foreach_lerp_(self._averages, [value.detach() for value in self._live], 1 - self._decay)

    @torch.no_grad()
    def mask_(self) -> None:
        """Call when masks have been chosen."""
        average_of = dict(zip(self._live, self._averages, strict=True))
        layers = list(self._acdc.layers.values())
        if layers:
            torch._foreach_mul_(
                [average_of[layer.weight] for layer in layers], [each.mask for each in layers]
            )

    @contextmanager
    def in_place(self) -> Iterator[nn.Module]:
        """The model has the averages meanwhile, in place of its own values, which come back bit for bit; what
        is then done to its statistics stays done to the averages."""
        self._swap()
        try:
            yield self._acdc.model
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for value, average in zip(self._live, self._averages, strict=True):
            held = value.detach().clone()
            value.copy_(average)
            average.copy_(held)

    def weights(self) -> dict[str, Tensor]:
        """Parameter name -> its average, live."""
        return dict(zip(self._parameters, self._averages, strict=False))

    def statistics(self) -> dict[str, Tensor]:
        """Buffer name -> its average on this rank, live."""
        return dict(zip(self._buffers, self._averages[len(self._parameters) :], strict=True))

    @torch.no_grad()
    def begin(self, weights: Mapping[str, Tensor] = {}, statistics: Mapping[str, Tensor] = {}) -> None:
        """Go on from these averages. What is in neither begins as the model's own."""
        known = {**weights, **statistics}
        for name, value, average in zip(
            (*self._parameters, *self._buffers), self._live, self._averages, strict=True
        ):
            average.copy_(known.get(name, value.detach()))
        self.mask_()
