"""Make the bundled subset: python -m data.datasets.bundled.make_fashion_mnist_subset FOLDER_WITH_IDX_FILES

Class-balanced, in the original order: the first 1,200 training and 200 test images of each class. The full
set is in Debian's package dataset-fashion-mnist: `apt-get download dataset-fashion-mnist`, `dpkg -x`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from data.datasets import fashion_mnist

PER_CLASS = {"train": 1200, "test": 200}


def main(folder: Path) -> None:
    arrays = {}
    for split in ("train", "test"):
        full = fashion_mnist.load(folder, split)
        first = [
            np.flatnonzero(full.labels == label)[: PER_CLASS[split]] for label in range(full.num_classes)
        ]
        chosen = np.sort(np.concatenate(first))
        arrays[f"{split}_images"] = full.images[chosen, :, :, 0]
        arrays[f"{split}_labels"] = full.labels[chosen].astype(np.uint8)
    path = fashion_mnist.write_archive(fashion_mnist.BUNDLED, arrays)
    print(f"{path}: {path.stat().st_size:,} bytes, " + ", ".join(f"{k} {v.shape}" for k, v in arrays.items()))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
