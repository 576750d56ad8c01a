"""Pixels of an image that Pillow opens, as DALI decodes the same file: the torch backend's images, and what
`acdc verify-data` tries.

What DALI 2.4 does not decode as its format says stays different. It leaves PPM and PGM unscaled whose
maximum is neither 255 nor 65535, gets TIFF of grey with alpha wrong, and takes other colours from CIELAB TIFF
and from TIFF whose colours are multiplied by alpha. It refuses BMP of 15 bits, TIFF of 1 bit without
BitsPerSample or of signed bytes, and WebP with metadata behind an odd number of bytes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image


def to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    """(height, width, 3), as stored: no orientation applied, transparency dropped, grey in all channels.
    16 bits are scaled to 8, so that 65535 is white; floating-point numbers too, with white at 1.

    image: opened from bytes or an open file, and not loaded. Raises ValueError for numbers of which none is
    known to be white, and what Pillow raises for damaged content."""
    if image.format == "TIFF":  # the one format that Pillow turns while it loads
        image.getexif()[ExifTags.Base.Orientation] = 1
        if image.mode == "I":
            raise ValueError("signed or 32-bit pixels, whose white is unknown: store 8 or 16 bits, unsigned")
    image.info.pop("transparency", None)  # else converting a palette warns of losing it
    if image.mode == "F":
        shares = np.nan_to_num(np.asarray(image.copy())).clip(0, 1)
        grey = np.floor(shares * np.float32(255) + np.float32(0.5))
    elif image.mode.startswith("I"):  # which Image.convert would clip at 255
        grey = (np.asarray(image.copy()).astype(np.int32) + 128) // 257
    else:
        return np.array(image.convert("RGB"))
    return np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2)
