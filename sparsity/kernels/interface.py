"""What a kernel is: how a layer computes in training steps of compressed phases, if not with its masked dense
weight. A family of kernels says for which layers it is right and measures them; sparsity.kernels.choose
chooses between it and dense, layer by layer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple, Protocol

from torch import Tensor, nn

from sparsity.kernels.measure import Measured


class Kernel(ABC):
    """One object for all layers that run it: compiled code compares with it.

    name: unique, for people, records and training states. sparse_gradient: whether the input gradient skips
    dropped weights, too. fallback: what runs where the mask does not fit; None: the masked dense product,
    which is right for every mask.
    """

    name: ClassVar[str]
    sparse_gradient: ClassVar[bool] = False
    fallback: ClassVar[Kernel | None] = None

    @abstractmethod
    def __call__(self, layer: Any, input: Tensor) -> Tensor:
        """The output of a masked layer in training: as with weight * mask, and so its gradients."""

    @abstractmethod
    def fits(self, mask: Tensor) -> Tensor:
        """Whether the kernel is right for a layer with this keep-mask: bool, (), not read from the device."""

    def chain(self) -> Iterator[Kernel]:
        """The kernel, its fallback, and so on."""
        yield self
        if self.fallback is not None:
            yield from self.fallback.chain()


class Shape(NamedTuple):
    """Of a layer's product. rows: images times output positions of a step on one device. inputs, outputs:
    channels."""

    rows: int
    inputs: int
    outputs: int


class KernelFamily(Protocol):
    """Kernels that are chosen together, on one device in one precision."""

    @property
    def key(self) -> str:
        """Tells apart what was measured for one device, precision and library from what was for others."""

    def reason_unsupported(self, layer: nn.Module, num_rows: int) -> str | None:
        """Why a layer cannot run these kernels over so many rows, or None."""

    def measure(self, shape: Shape) -> Measured:
        """Time one shape, and compare results with the dense product's. Raises torch.OutOfMemoryError where
        there is no room for its operands."""

    def choose(self, measured: Measured, required: bool) -> Kernel | None:
        """The fastest that is right, None for the dense product; required: one that is right, if there is
        one, faster or not."""
