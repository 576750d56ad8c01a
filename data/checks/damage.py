"""What is wrong with one image file, judged from its bytes alone.

Decoders are lenient: libjpeg fills in what is missing, prints a warning at most, and hands over a picture. So
JPEGs go through libjpeg-turbo by simplejpeg, which makes an error of every warning. Its entropy decoder
notices data that end too early or too late, codes that do not exist, and markers out of place.

Out of reach without a checksum is damage that leaves the data well-formed: most single flipped bits, and some
overwritten blocks. Stray bytes before the end of the picture, up to nine, are common and let pass, as are
up to 99 of them between segments of the header.
"""

from __future__ import annotations

import io
import re
import warnings
from pathlib import PurePosixPath

import simplejpeg
from PIL import Image, UnidentifiedImageError

from data.images.pixels import to_rgb

FORMATS = {
    "JPEG": (".jpeg", ".jpg"),
    "PNG": (".png",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
    "PPM": (".ppm",),
}
_ZEROS = bytes(64)  # shorter runs of zeros are let pass
_JPEG, _JPEG_SCAN, _JPEG_END = b"\xff\xd8", b"\xff\xda", b"\xff\xd9"
_PNG_END = b"IEND\xae\x42\x60\x82"  # the last chunk and its checksum, which Pillow does not ask for
# counts and first symbol of the table of AC codes for brightness in ITU T.81, table K.5, which most encoders
# write; its shortest code, of two zero bits, is no end of block, so it takes all zeros for coefficients of -1
_USUAL_CODES = bytes([0, 2, 1, 3, 3, 2, 4, 3, 5, 5, 4, 4, 0, 0, 1, 125, 1])
# what TurboJPEG does not know, need not, or what cameras leave before the end-of-image marker
_HARMLESS = re.compile(
    r"subsampling|JFIF|Adobe|ICC|SOS parameters|data: \d extraneous bytes before marker 0xd9"
    r"|data: \d\d? extraneous bytes before marker 0x(db|e.|fe)"
)
_END_OF_SCAN = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")

Finding = tuple[str, str]  # kind, detail


def diagnose(content: bytes, name: str) -> Finding | None:
    """What is wrong with the image file `name` of this content, None where nothing is: (kind, detail).

    kind: "empty", "truncated" or "garbage" where it cannot be used, "wrong name" or "cmyk" where it can.
    Raises nothing: whatever a decoder raises is "truncated" or "garbage".
    """
    if not content:
        return "empty", "0 bytes"
    if not content.strip(b"\0"):
        return "garbage", f"all {len(content)} bytes are zero"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about metadata, and sizes half of what is refused
            found, mode = _decode(content)
    except Exception as error:  # decoders raise nearly everything, and a pass over a data set must go on
        return _describe(content, error)
    suffix = PurePosixPath(name).suffix
    if suffix.lower() not in FORMATS[found]:
        return "wrong name", f"the content is {found}, the name says {suffix}"
    if found == "JPEG" and mode == "CMYK":
        return "cmyk", "a JPEG of four inks (CMYK or YCCK): not every decoder gets its colours right"
    return None


def _decode(content: bytes) -> tuple[str, str]:
    """Format and mode of an image that is whole. Raises whatever a decoder raises."""
    with Image.open(io.BytesIO(content), formats=tuple(FORMATS)) as image:
        found = str(image.format).replace("MPO", "JPEG")  # MPO: several JPEGs in a file
        if found == "JPEG":
            _decode_jpeg(content, image)
            return found, image.mode
        if found == "PNG":
            image.verify()  # its checksums, which decoding ignores; it has to be opened anew after that
    with Image.open(io.BytesIO(content), formats=(found,)) as image:
        to_rgb(image)
    if found == "PNG" and _PNG_END not in content:
        raise ValueError("truncated: its last chunk is missing")
    return found, image.mode


def _decode_jpeg(content: bytes, image: Image.Image) -> None:
    try:  # the codes of all coefficients are read; of grey, fewer pixels are computed
        simplejpeg.decode_jpeg(content, "GRAY", strict=True)
    except ValueError as error:
        if not _HARMLESS.search(str(error)):
            raise
        to_rgb(image)
    at, usual = len(_JPEG), False
    while not content.startswith(_JPEG_SCAN, at):
        code, end = content[at + 1], at + 2 + int.from_bytes(content[at + 2 : at + 4], "big")
        usual |= code == 0xC4 and _USUAL_CODES in content[at:end]
        # any number of FF may precede a marker, and what was let pass above
        at = content.index(b"\xff", at + 1 if code == 0xFF else end)
    last = _END_OF_SCAN.search(content, at + 2)
    zeros = content.find(_ZEROS, at, last.start() if last else None)
    if usual and zeros >= 0:
        raise ValueError(f"{len(_ZEROS)} bytes of zero at byte {zeros}, which no encoder writes there")


def _describe(content: bytes, error: Exception) -> Finding:
    """What the error of a decoder says of the file."""
    if content.startswith(_JPEG) and content.rfind(_JPEG_END) <= content.rfind(_JPEG_SCAN):
        num_zeros = len(content) - len(content.rstrip(b"\0"))
        zeros = f", the last {num_zeros} of them zero" if num_zeros >= len(_ZEROS) else ""
        return "truncated", f"it ends after {len(content)} bytes{zeros}, without an end-of-image marker"
    if isinstance(error, UnidentifiedImageError):
        return "garbage", f"not an image of a known format: it begins with {content[:8]!r}"
    detail = f"cannot be decoded: {str(error) or type(error).__name__}"
    return "truncated" if "truncated" in detail.lower() else "garbage", detail
