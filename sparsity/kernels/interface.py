"""What a kernel is: how a layer computes in training steps of compressed phases, if not with its masked dense
weight. A family of kernels says for which layers it is right and measures them; sparsity.kernels.choose
chooses between it and dense, layer by layer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from sparsity.flops import Call
from sparsity.kernels.measure import Measured


class KernelUnavailableError(RuntimeError):
    """A kernel that cannot run on this machine; the message says why."""


class Kernel(ABC):
    """Compiled code compares with the object: a layer keeps one from phase to phase.

    name: for people, records and training states, which make the kernel anew from it (see
    sparsity.execution). sparse_products: how many of a layer's three products skip dropped weights, in the
    order forward, input gradient, weight gradient. fallback: what runs where the mask does not fit; None: the
    masked dense product, which is right for every mask.
    """

    name: str
    sparse_products: ClassVar[int] = 1
    fallback: Kernel | None = None

    @property
    def title(self) -> str:
        """The name for tables: without what only a training state needs."""
        return self.name

    @abstractmethod
    def __call__(self, layer: Any, input: Tensor) -> Tensor:
        """The output of a masked layer in training: as with weight * mask, and so its gradients."""

    def fits(self, mask: Tensor) -> Tensor:
        """Whether the kernel is right for a layer with this keep-mask: bool, (), not read from the device. By
        default for every mask."""
        return mask.new_ones(())

    def of(self, layer: nn.Module) -> Kernel:
        """The kernel of this layer alone, where it keeps something of the layer's; else itself."""
        return self

    def prepare(self, layer: Any) -> None:  # noqa: B027
        """Called before the kernel runs, each time the layer's mask has changed. Raises
        KernelUnavailableError."""

    def chain(self) -> Iterator[Kernel]:
        """The kernel, its fallback, and so on."""
        yield self
        if self.fallback is not None:
            yield from self.fallback.chain()


# What tells apart the times of layers: a family's own named tuple of whole numbers
Shape = tuple[int, ...]


class KernelFamily(Protocol):
    """Kernels that are chosen together, on one device in one precision."""

    @property
    def key(self) -> str:
        """Tells apart what was measured for one device, precision and library from what was for others."""

    @property
    def between(self) -> Kernel | None:
        """What a layer runs that stands between kernels of the family and has none of its own; None: the
        dense product alone, for kernels that keep torch's memory format."""

    def has(self, kernel: Kernel) -> bool:
        """Whether the kernel is one of these: that of a training state may be another device's."""

    def shape(self, layer: Any, calls: Sequence[Call], images: int) -> Shape | str:
        """What to measure for a masked layer, or why it runs dense. calls: of the layer for one image, at
        every size that is trained on; a layer must fit at all of them and is measured at the greatest.
        images: of a step on one device."""

    def measure(self, shape: Any) -> Measured:
        """Time one shape, and compare results with the dense product's. Raises torch.OutOfMemoryError where
        there is no room for its operands, KernelUnavailableError where there is no code for it."""

    def choose(self, measured: Measured, required: bool) -> Kernel | None:
        """The fastest that is right, None for the dense product; required: one that is right, if there is
        one, faster or not."""
