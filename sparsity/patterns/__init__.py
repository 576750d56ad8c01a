"""Which weights to keep: a pattern per module. What is done with the masks: sparsity.acdc."""

from sparsity.patterns.interface import Masks, Pattern, Rule, Weights
from sparsity.patterns.magnitude import GlobalMagnitude, UniformMagnitude
from sparsity.patterns.nm import NM
from sparsity.patterns.random import DropAndGrow, RandomMask
from sparsity.patterns.transposable import Transposable24, is_24

__all__ = [
    "NM",
    "DropAndGrow",
    "GlobalMagnitude",
    "Masks",
    "Pattern",
    "RandomMask",
    "Rule",
    "Transposable24",
    "UniformMagnitude",
    "Weights",
    "is_24",
]
