"""Random labels for some training images: the paper's memorisation experiment (section 5).

A model that fits them has memorised those images: during training one watches its accuracy on them, once
against the random labels that it is trained on and once against their true ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from data.datasets.arrays import ImageArrays

_STREAM = 2  # a random stream of its own under the run's seed, see data.stream


@dataclass(frozen=True)
class RandomLabels:
    """train: the whole set, relabelled. random, true: the relabelled images alone, with either labels."""

    train: ImageArrays
    random: ImageArrays
    true: ImageArrays


def randomise(train: ImageArrays, count: int, seed: int) -> RandomLabels:
    """Give `count` images a label drawn uniformly from all classes: about one in num_classes keeps its own.

    Depends on seed alone, so every rank and every resumed run draws the same. Raises ValueError when the set
    has fewer images.
    """
    if not 0 < count <= len(train):
        raise ValueError(
            f"random labels for {count} of {len(train)} training images: 1 or more, and no more than all"
        )
    random = np.random.default_rng((seed, _STREAM))
    chosen = np.sort(random.permutation(len(train))[:count])
    drawn = random.integers(0, train.num_classes, count)
    labels = train.labels.copy()
    labels[chosen] = drawn
    subset = replace(train, images=train.images[chosen], labels=train.labels[chosen])
    return RandomLabels(replace(train, labels=labels), replace(subset, labels=drawn), subset)
