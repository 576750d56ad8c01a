"""The same pixels from both backends, whatever a file's format and depth."""

import io
import struct
import zlib
from functools import lru_cache

import numpy as np
import pytest
import torch
from PIL import Image

from data.checks.damage import diagnose
from data.crops import CropStream
from data.dali.files import DaliFileLoader
from data.images.files import EXTENSIONS, load_image_files
from data.images.pixels import to_rgb
from data.stream import EvalStream
from data.torch_files import TorchFileLoader
from tests.conftest import refuse
from tests.data.photographs import photograph

CPU = torch.device("cpu")
HEIGHT, WIDTH = 64, 96


def colour16():
    """(HEIGHT, WIDTH, 3), uint16: a photograph with 16 bits that 8 do not hold."""
    random = np.random.default_rng(0)
    coarse = np.asarray(photograph(0, WIDTH, HEIGHT)).astype(np.int64) * 257
    return np.clip(coarse + random.integers(-128, 129, coarse.shape), 0, 65535).astype(np.uint16)


def png16(array):
    """A PNG of 16 bits a channel, of 1 to 4 channels; Pillow writes grey alone."""

    def chunk(name, content):
        checksum = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)

    height, width, channels = array.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.tobytes() for row in array.astype(">u2"))
    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + content


def encode(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def orientation(number):
    exif = Image.Exif()
    exif[0x0112] = number
    return exif


@lru_cache(maxsize=1)
def images():
    """File name -> content: a photograph in every format and mode that both backends decode alike."""
    deep = colour16()
    colour = Image.fromarray((deep >> 8).astype(np.uint8))
    grey, palette, bits = colour.convert("L"), colour.quantize(100), colour.convert("1")
    alpha = Image.linear_gradient("L").resize((WIDTH, HEIGHT))
    clear, grey_clear = colour.copy(), Image.merge("LA", (grey, alpha))
    clear.putalpha(alpha)
    deep_alpha = np.asarray(alpha).astype(np.uint16)[..., None] * 257
    grey16, big_endian = deep[..., 0], Image.frombytes("I;16B", (WIDTH, HEIGHT), deep[..., 0].astype(">u2"))
    floats = Image.fromarray(grey16.astype(np.float32) / 60000 - np.float32(0.02))  # some below 0 and above 1
    ascii16 = " ".join(map(str, grey16.ravel()))
    content = {
        "grey16.png": png16(deep[..., :1]),
        "colour16.png": png16(deep),
        "grey16-alpha.png": png16(np.concatenate([deep[..., :1], deep_alpha], 2)),
        "colour16-alpha.png": png16(np.concatenate([deep, deep_alpha], 2)),
        "grey16.tif": encode(Image.fromarray(grey16), "TIFF"),
        "grey16-big-endian.tif": encode(big_endian, "TIFF"),
        "grey16-deflate.tif": encode(Image.fromarray(grey16), "TIFF", compression="tiff_adobe_deflate"),
        "floats.tif": encode(floats, "TIFF"),
        "grey16.ppm": f"P5 {WIDTH} {HEIGHT} 65535\n".encode() + grey16.astype(">u2").tobytes(),
        "grey16-ascii.ppm": f"P2 {WIDTH} {HEIGHT} 65535\n{ascii16}\n".encode(),
        "colour16.ppm": f"P6 {WIDTH} {HEIGHT} 65535\n".encode() + deep.astype(">u2").tobytes(),
        "palette-alphas.png": encode(palette, "PNG", transparency=bytes(range(100))),
        "palette-clear.png": encode(palette, "PNG", transparency=3),
        "colour-clear.png": encode(colour, "PNG", transparency=colour.getpixel((0, 0))),
        "cmyk.jpg": encode(colour.convert("CMYK"), "JPEG", quality=95),
        "cmyk.tif": encode(colour.convert("CMYK"), "TIFF"),
        "ycbcr.tif": encode(colour.convert("YCbCr"), "TIFF", compression="jpeg"),
        "bits.tif": encode(bits, "TIFF", compression="group4"),
        "lossy-alpha.webp": encode(clear, "WEBP"),
        "turned.jpeg": encode(colour, "JPEG", exif=orientation(6)),
    }
    for suffix, kind in (("png", "PNG"), ("bmp", "BMP"), ("tiff", "TIFF")):
        modes = {"colour": colour, "grey": grey, "palette": palette, "clear": clear}
        content |= {f"{mode}.{suffix}": encode(image, kind) for mode, image in modes.items()}
    for suffix, kind in (("png", "PNG"), ("bmp", "BMP"), ("ppm", "PPM")):
        content[f"bits.{suffix}"] = encode(bits, kind)
    content["grey-alpha.png"] = encode(grey_clear, "PNG")
    for number in range(2, 9):
        content[f"turned{number}.tif"] = encode(colour, "TIFF", exif=orientation(number))
        content[f"turned{number}.png"] = encode(colour, "PNG", exif=orientation(number))
    content["turned6-lzw.tif"] = encode(colour, "TIFF", exif=orientation(6), compression="tiff_lzw")
    content["turned6-grey16.tif"] = encode(Image.fromarray(grey16), "TIFF", exif=orientation(6))
    return content


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("formats")
    for split in ("train", "val"):
        folder = root / split / "n0"
        folder.mkdir(parents=True)
        for name, content in images().items():
            (folder / name).write_bytes(content)
    assert {path.suffix for path in folder.iterdir()} == set(EXTENSIONS)
    return root


def test_both_backends_give_the_same_pixels(tree):
    """Not resized, so that decoders alone are compared."""
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    files = load_image_files(tree, "test")
    order = EvalStream(len(files), len(files))
    (ours,) = TorchFileLoader(files, order, CPU, 0, refuse, (HEIGHT, HEIGHT)).epoch(0)
    (dalis,) = DaliFileLoader(files, order, CPU, 2, "cpu", refuse, (HEIGHT, HEIGHT)).epoch(0)
    worst = (ours.images.int() - dalis.images.int()).abs().flatten(1).amax(1).tolist()
    far = {file: levels for file, levels in zip(files.files, worst, strict=True) if levels > 2}
    assert not far


def test_both_backends_give_the_same_crops(tree):
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    files = load_image_files(tree, "train")
    crops = CropStream(len(files), len(files), seed=2, flip=True, sizes=((0, 32),))
    (ours,) = TorchFileLoader(files, crops, CPU, 0, refuse).epoch(0)
    (dalis,) = DaliFileLoader(files, crops, CPU, 2, "cpu", refuse).epoch(0)
    numbers, means = crops.draw(0, 0).indices, (ours.images.float() - dalis.images.float()).abs()
    far = {files.files[n]: mean for n, mean in zip(numbers, means.mean((1, 2, 3)).tolist(), strict=True)}
    assert max(far.values()) < 1, far


@pytest.mark.parametrize("name", images())
def test_good_files_are_not_called_bad(name):
    assert diagnose(images()[name], name) in (
        None,
        ("cmyk", "a JPEG of four inks (CMYK or YCCK): not every decoder gets its colours right"),
    )


def test_every_level_of_16_bits_and_of_floats():
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = np.rint(levels / 257)
    for content in (png16(levels[..., None]), encode(Image.fromarray(levels), "TIFF")):
        with Image.open(io.BytesIO(content)) as image:
            pixels = to_rgb(image)
        assert pixels.shape == (256, 256, 3)
        assert pixels.dtype == np.uint8
        assert (pixels == expected[..., None]).all()
    shares = np.array([[-1, 0, 0.25, 0.5, 1, 2, np.inf, -np.inf, np.nan]], np.float32)
    with Image.open(io.BytesIO(encode(Image.fromarray(shares), "TIFF"))) as image:
        assert to_rgb(image)[0, :, 1].tolist() == [0, 0, 64, 128, 255, 255, 255, 0, 0]


@pytest.mark.parametrize("backend", ["dali", "torch"])
def test_signed_and_32_bit_numbers_are_refused_and_found(tmp_path, backend):
    folder = tmp_path / "val" / "n0"
    folder.mkdir(parents=True)
    content = encode(Image.fromarray(np.arange(64, dtype=np.int32).reshape(8, 8)), "TIFF")
    (folder / "a.tif").write_bytes(content)
    (folder / "b.png").write_bytes(images()["grey.png"])
    files, told = load_image_files(tmp_path, "test"), []
    on_bad = lambda file, reason: told.append(file)  # noqa: E731
    if backend == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed")
        loader = DaliFileLoader(files, EvalStream(2, 2), CPU, 2, "cpu", on_bad, (HEIGHT, HEIGHT))
    else:
        loader = TorchFileLoader(files, EvalStream(2, 2), CPU, 0, on_bad, (HEIGHT, HEIGHT))
    (batch,) = loader.epoch(0)
    assert told == ["val/n0/a.tif"]
    assert batch.labels.tolist() == [-1, 0]
    kind, detail = diagnose(content, "a.tif")
    assert kind == "garbage"
    assert "signed or 32-bit pixels, whose white is unknown" in detail
