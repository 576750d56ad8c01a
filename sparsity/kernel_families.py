"""Which kernels there are: by the name in a training state, and for a device, a precision and a pattern."""

from __future__ import annotations

import torch

from sparsity.kernels.interface import Kernel, KernelFamily
from sparsity.kernels.semi_structured import kernel as semi_structured
from sparsity.kernels.semi_structured.operator import missing
from sparsity.kernels.unstructured import kernel as unstructured
from sparsity.kernels.unstructured.family import SparseFamily
from sparsity.kernels.unstructured.library import BuildError, find_compiler, load
from sparsity.patterns import Pattern
from sparsity.transposable import Transposable24, is_24


def kernel_named(name: str) -> Kernel | None:
    """The kernel of that name, or None where this version has none."""
    of_24 = (semi_structured.FORWARD, semi_structured.TRANSPOSED)
    return next((kernel for kernel in of_24 if kernel.name == name), None) or unstructured.from_name(name)


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
    return needed or semi_structured.Family24(device, dtype, isinstance(pattern, Transposable24))
