"""Sparse training for anybody's PyTorch loop: phase schedules, mask patterns, masked layers, AC/DC."""

from sparsity.acdc import ACDC
from sparsity.flops import ModelFlops, count_flops
from sparsity.gradual import CubicSparsity, Regrowth
from sparsity.guard import MaskError, find_escaping
from sparsity.kernels.interface import Kernel
from sparsity.kernels.semi_structured.kernel import Run24
from sparsity.kernels.unstructured.fusion import inductor
from sparsity.layers import AveragedModel, mask_layers, to_plain
from sparsity.modules.attention import MaskedAttention
from sparsity.modules.layers import MaskedConv2d, MaskedLinear
from sparsity.patterns import (
    NM,
    GlobalMagnitude,
    Pattern,
    RandomMask,
    Transposable24,
    UniformMagnitude,
)
from sparsity.schedule import Phase, PhaseSchedule
from sparsity.stats import MaskChange, Sparsity, measure, num_leaked, relative_mask_difference

__all__ = [
    "ACDC",
    "NM",
    "AveragedModel",
    "CubicSparsity",
    "GlobalMagnitude",
    "Kernel",
    "MaskChange",
    "MaskError",
    "MaskedAttention",
    "MaskedConv2d",
    "MaskedLinear",
    "ModelFlops",
    "Pattern",
    "Phase",
    "PhaseSchedule",
    "RandomMask",
    "Regrowth",
    "Run24",
    "Sparsity",
    "Transposable24",
    "UniformMagnitude",
    "count_flops",
    "find_escaping",
    "inductor",
    "mask_layers",
    "measure",
    "num_leaked",
    "relative_mask_difference",
    "to_plain",
]
