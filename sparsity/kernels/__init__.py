"""How masked layers compute in compressed phases, chosen by measurement. Which weights stay: patterns."""

from sparsity.kernels.interface import Kernel
from sparsity.kernels.semi_structured.kernel import FORWARD, TRANSPOSED

__all__ = ["KERNELS", "Kernel"]

# by name, as training states hold them
KERNELS: dict[str, Kernel] = {kernel.name: kernel for kernel in (FORWARD, TRANSPOSED)}
