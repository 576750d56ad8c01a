"""The images that runs train on, of Fashion-MNIST: all of them, or archives that hold a part."""

from __future__ import annotations

import shutil
from pathlib import Path

from data.datasets import fashion_mnist
from data.places import data_home
from trainer.errors import UserError

HELD_OUT = 10_000  # of 60,000 training images, the last


def root_of(images: str) -> Path:
    """The data.root for `images`; an archive is made where it is not there yet.

    all: the set as it is. first_10000: its first 10,000 training images. held_out: it trains on the first
    50,000 and is evaluated on the other training images. bundled: what the quickstart trains on. Raises
    UserError for the others without the full set.
    """
    whole = data_home() / "fashion-mnist"
    if images == "bundled":
        archive = whole / images / fashion_mnist.ARCHIVE
        archive.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(fashion_mnist.BUNDLED, archive)
        return archive.parent
    if not (whole / fashion_mnist.ARCHIVE).exists():
        raise UserError("these runs need the full Fashion-MNIST: acdc prepare fashion-mnist")
    if images == "all":
        return whole
    root = whole / images
    if not (root / fashion_mnist.ARCHIVE).exists():
        train, test = (fashion_mnist.load(whole, split) for split in ("train", "test"))
        x, y = train.images[..., 0], train.labels.astype("uint8")
        if images == "held_out":
            parts = (x[:-HELD_OUT], y[:-HELD_OUT], x[-HELD_OUT:], y[-HELD_OUT:])
        else:
            parts = (x[:10_000], y[:10_000], test.images[..., 0], test.labels.astype("uint8"))
        keys = ("train_images", "train_labels", "test_images", "test_labels")
        fashion_mnist.write_archive(root / fashion_mnist.ARCHIVE, dict(zip(keys, parts, strict=True)))
    return root
