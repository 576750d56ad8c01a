"""2:4 masks whose transpose is 2:4 as well, so that the input gradient can run on sparse tensor cores too.

Every 4 x 4 block of (output, input) channels keeps 2 weights in each row and each column: one of 90 patterns,
chosen so that the kept magnitudes' sum is the largest (Hubara et al., NeurIPS 2021, solve the same problem by
min-cost flow; with 90 candidates all of them are tried). A row-wise 2:4 mask keeps more magnitude, and its
input gradient runs dense.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsity.patterns.interface import Masks, Pattern, Weights
from sparsity.patterns.nm import NM

BLOCK = 4
CHUNK = 1 << 16  # blocks scored at a time: 24 MB of scores


@dataclass(frozen=True)
class Transposable24:
    """Keep the best 2 of 4 in each row and column of every 4 x 4 block of (output, input) channels.

    A convolution's kernel positions are taken one by one, so that its (out, kh, kw, in) reading is 2:4 along
    the inputs and along the outputs. A layer whose output or input channels are not a multiple of 4 follows
    NM(2, 4), see `straddling`. Equal sums: the first pattern, in lexicographic order of kept columns.
    """

    @property
    def sparsity(self) -> float:
        return 0.5

    def __call__(self, weights: Weights) -> Masks:
        others = set(self.straddling(weights))
        rowwise = NM(2, 4)({name: weights[name] for name in others})
        return {
            name: rowwise[name] if name in others else _mask(weight.detach())
            for name, weight in weights.items()
        }

    def straddling(self, weights: Weights) -> list[str]:
        """Layers without whole 4 x 4 blocks."""
        return [
            name for name, weight in weights.items() if weight.shape[0] % BLOCK or weight.shape[1] % BLOCK
        ]


def is_24(pattern: Pattern) -> bool:
    """Whether a pattern's masks are what 2:4 kernels read."""
    return isinstance(pattern, Transposable24) or (
        isinstance(pattern, NM) and (pattern.n, pattern.m) == (2, 4)
    )


def _mask(weight: Tensor) -> Tensor:
    """Boolean keep-mask of (out, in, ...) weights, both divisible by 4."""
    out, inputs = weight.shape[:2]
    planes = weight.abs().flatten(2) if weight.dim() > 2 else weight.abs()[..., None]
    split = planes.reshape(out // BLOCK, BLOCK, inputs // BLOCK, BLOCK, -1)
    blocks = split.permute(0, 2, 4, 1, 3).reshape(-1, BLOCK * BLOCK)
    patterns = _patterns(weight.device)
    scores = patterns.to(blocks.dtype).t()
    best = torch.cat([(chunk @ scores).argmax(1) for chunk in torch.split(blocks, CHUNK)])
    keep = patterns[best].view(out // BLOCK, inputs // BLOCK, -1, BLOCK, BLOCK)
    return keep.permute(0, 3, 1, 4, 2).reshape(weight.shape)


def _patterns(device: torch.device) -> Tensor:
    """(90, 16), bool: all 4 x 4 patterns with two in each row and each column."""
    rows = [[column in pair for column in range(BLOCK)] for pair in itertools.combinations(range(BLOCK), 2)]
    every = torch.tensor(list(itertools.product(rows, repeat=BLOCK)), device=device)  # (6^4, 4, 4)
    return every[(every.sum(1) == 2).all(1)].flatten(1)
