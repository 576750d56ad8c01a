"""npz and idx files whose headers are damaged, or made to harm, end in a ValueError that names them."""

import random
import struct
import zipfile

import pytest
import torch

from data.datasets import fashion_mnist
from data.datasets.idx import read_idx
from trainer.checkpoints.mask_history import load_masks, save_masks

SHAPE = "{'descr': '|u1', 'fortran_order': False, 'shape': %s}"
HEADERS = (
    SHAPE % "(100000000000000, 28, 28)",
    SHAPE % "(99999999999999999999999,)",
    SHAPE % "(-1, 28, 28)",
    "{'descr': '|O', 'fortran_order': False, 'shape': (1,)}",
    "{'descr': '<f8', 'fortran_order': False, 'shape': (2,)}",
    "{'descr'",
    "(((((((",
    "[" * 5000,
)


def write_npz(path, header, names):
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            text = header.encode() + b"\n"
            head = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text))
            archive.writestr(f"{name}.npy", head + text + bytes(100))


@pytest.mark.parametrize("header", HEADERS)
def test_absurd_headers(header, tmp_path):
    write_npz(tmp_path / "fashion_mnist.npz", header, ["test_images", "test_labels"])
    with pytest.raises(ValueError, match=r"fashion_mnist\.npz: not a"):
        fashion_mnist.load(tmp_path, "test")
    write_npz(tmp_path / "masks.npz", header, ["conv", "conv.shape"])
    with pytest.raises(ValueError, match=r"masks\.npz is not a file of masks"):
        load_masks(tmp_path / "masks.npz")


def test_flipped_bits_of_masks(tmp_path):
    """Those of images: test_fashion_mnist."""
    generator, masks = random.Random(0), tmp_path / "masks.npz"
    save_masks(masks, {"conv": torch.rand(4, 4, 3, 3, generator=torch.Generator().manual_seed(0)) > 0.5})
    whole, refused = masks.read_bytes(), 0
    for _ in range(400):
        content = bytearray(whole)
        content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        masks.write_bytes(content)
        try:
            load_masks(masks)
        except ValueError as error:
            refused += str(masks) in str(error)
    assert refused > 100


@pytest.mark.parametrize(
    "shape", [[2**32 - 1] * 4, [2**31, 2**31, 4], [2**32 - 1, 28, 28], [2**32 - 1, 2**32 - 1]]
)
def test_idx_sizes_that_no_integer_holds(shape, tmp_path):
    path = tmp_path / "images"
    head = b"\0\0\x08" + bytes([len(shape)]) + b"".join(struct.pack(">I", size) for size in shape)
    for content in (head, head + b"abc"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{path}: .* asks for "):
            read_idx(path)
