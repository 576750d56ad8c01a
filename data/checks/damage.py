"""What is wrong with one image file, judged from its bytes alone.

Decoders are lenient: libjpeg fills in what is missing, prints a warning at most, and hands over a picture. So
a JPEG is first read as a sequence of segments, which finds truncation at any byte, markers where none can be,
and restart markers out of order; only then is it decoded, strictly.

Two things need a closer look: a run of zeros, since encoders write long ones for evenly coloured areas, and
bytes after the end of the picture, since its marker may be there by chance. The codes of the scan are then
counted through: data that have lost their meaning end before the last block, or some time after it. Out of
reach without a checksum are zeros in metadata and in progressive scans that refine DC by single bits, and
damage that leaves the data well-formed: most single flipped bits, and some short overwritten blocks.
"""

from __future__ import annotations

import io
import re
import warnings
from dataclasses import dataclass, field
from itertools import chain, cycle, islice
from math import ceil
from pathlib import PurePosixPath

import numpy as np
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
_NUM_SUSPECT = 64  # bytes: shorter runs of zeros, and shorter stretches between segments, are let pass
_MARKER = re.compile(rb"\xff[^\x00\xff]")
_END_OF_SCAN = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_RESTART = re.compile(rb"\xff([\xd0-\xd7])")
_EOI, _SOS, _DQT, _DHT, _DRI, _DNL = 0xD9, 0xDA, 0xDB, 0xC4, 0xDD, 0xDC
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_HUFFMAN_FRAMES = {0xC0, 0xC1, 0xC2}
_PROGRESSIVE = 0xC2
_PNG_END = b"IEND\xae\x42\x60\x82"  # the last chunk and its checksum, which Pillow does not ask for
_ENDS = range(0x00, 0xF0, 0x10)  # AC symbols that end a block, and in progressive scans some more
_SEGMENTS = _FRAMES | {0xCC, _SOS, _DQT, _DHT, _DRI, _DNL, 0xFE, *range(0xE0, 0xF0)}

Finding = tuple[str, str]  # kind, detail
Codes = list[tuple[int, int]]  # by the next 16 bits: length of the code that they begin with, and its symbol


class _Damage(Exception):
    """Arguments: kind, detail."""


@dataclass
class _Jpeg:
    """What the segments so far have declared. sampling: component -> (horizontal, vertical) factors.
    tables: (class, slot) -> code lengths' counts and symbols, as in ITU T.81, B.2.4.2."""

    frame: int = 0
    height: int = 0
    width: int = 0
    restart_interval: int = 0
    num_scans: int = 0
    sampling: dict[int, tuple[int, int]] = field(default_factory=dict)
    tables: dict[tuple[int, int], tuple[bytes, bytes]] = field(default_factory=dict)


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
        if content.startswith(b"\xff\xd8"):
            _check_jpeg(content)
        return _decode(content, name)
    except _Damage as damage:
        return damage.args[0], damage.args[1]
    except UnidentifiedImageError:
        return "garbage", f"not an image of a known format: it begins with {content[:8]!r}"
    except Exception as error:  # decoders raise nearly everything, and a pass over a data set must go on
        detail = f"cannot be decoded: {str(error) or type(error).__name__}"
        return "truncated" if "truncated" in detail.lower() else "garbage", detail


def _decode(content: bytes, name: str) -> Finding | None:
    formats = tuple(FORMATS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about metadata, and sizes half of what is refused
        with Image.open(io.BytesIO(content), formats=formats) as image:
            found = str(image.format).replace("MPO", "JPEG")  # MPO: several JPEGs in a file
            if found == "PNG":
                image.verify()  # its checksums, which decoding ignores; it has to be opened anew after that
                if _PNG_END not in content:
                    raise _Damage("truncated", f"{_extent(content)}, without its last chunk")
        with Image.open(io.BytesIO(content), formats=formats) as image:
            to_rgb(image)
            mode = image.mode
    suffix = PurePosixPath(name).suffix
    if suffix.lower() not in FORMATS[found]:
        return "wrong name", f"the content is {found}, the name says {suffix}"
    if found == "JPEG" and mode == "CMYK":
        return "cmyk", "a JPEG of four inks (CMYK or YCCK): not every decoder gets its colours right"
    return None


def _check_jpeg(content: bytes, count: bool = False) -> None:
    """Walk the segments up to the end-of-image marker. count: count through the codes of every scan."""
    jpeg, position = _Jpeg(), 2
    while True:
        marker = _MARKER.search(content, position)
        begin = marker.start() if marker else len(content)
        if begin - position >= _NUM_SUSPECT and marker:
            raise _Damage("garbage", f"{begin - position} bytes at {position} belong to no segment")
        if marker is None:
            raise _Damage("truncated", f"{_extent(content)}, without an end-of-image marker")
        code, position = content[begin + 1], marker.end()
        if code == _EOI:
            break
        if code not in _SEGMENTS:
            raise _Damage("garbage", f"a marker FF {code:02X} at byte {begin}, where none can be")
        length = int.from_bytes(content[position : position + 2], "big")
        if position + max(length, 2) > len(content):
            raise _Damage("truncated", f"{_extent(content)}, within the segment FF {code:02X}")
        payload = content[position + 2 : position + length]
        try:
            _read_segment(jpeg, code, payload)
        except (IndexError, ValueError) as error:
            raise _Damage("garbage", f"segment FF {code:02X} at byte {begin}: {error}") from error
        if code == _SOS:
            end = _END_OF_SCAN.search(content, position + length)
            if end is None:
                raise _Damage("truncated", f"{_extent(content)}, without an end-of-image marker")
            _check_scan(jpeg, payload, content, position + length, end.start(), count)
            position = end.start()
        else:
            position += length
    if not jpeg.num_scans:
        raise _Damage("truncated", "it ends before any image data")
    if len(content) - position >= _NUM_SUSPECT and not count:
        _check_jpeg(content, count=True)  # padding or a second picture follow, or the marker came by chance


def _extent(content: bytes) -> str:
    num_zeros = len(content) - len(content.rstrip(b"\0"))
    zeros = f", the last {num_zeros} of them zero" if num_zeros >= _NUM_SUSPECT else ""
    return f"it ends after {len(content)} bytes{zeros}"


def _read_segment(jpeg: _Jpeg, code: int, payload: bytes) -> None:
    """Take note of one segment. Raises ValueError or IndexError where it is not whole."""
    if code in _FRAMES:
        jpeg.frame = code
        jpeg.height, jpeg.width = int.from_bytes(payload[1:3], "big"), int.from_bytes(payload[3:5], "big")
        for component in range(6, 6 + 3 * payload[5], 3):
            factors = divmod(payload[component + 1], 16)
            if not all(factors):
                raise ValueError("a component has no samples")
            jpeg.sampling[payload[component]] = factors
    elif code == _DRI:
        jpeg.restart_interval = int.from_bytes(payload[:2], "big")
    elif code == _DQT:
        while payload:
            end = 1 + 64 * (2 if payload[0] >> 4 else 1)
            if not all(np.frombuffer(payload[1:end], ">u2" if payload[0] >> 4 else "u1", count=64)):
                raise ValueError("a quantisation step of zero")
            payload = payload[end:]
    elif code == _DHT:
        while payload:
            counts, symbols = payload[1:17], payload[17 : 17 + sum(payload[1:17])]
            if len(symbols) != sum(counts) or not 0 < len(set(symbols)) == len(symbols):
                raise ValueError("a code table that is cut short, empty, or names a symbol twice")
            jpeg.tables[divmod(payload[0], 16)] = counts, symbols
            payload = payload[17 + len(symbols) :]
    elif code == _SOS:
        jpeg.num_scans += 1


def _check_scan(jpeg: _Jpeg, header: bytes, content: bytes, begin: int, end: int, count: bool) -> None:
    """Restart markers come in order; long runs of zeros, which may reach back into the header, make sense."""
    found = b"".join(_RESTART.findall(content, begin, end))
    if found and not jpeg.restart_interval:
        raise _Damage("garbage", "a restart marker in image data that have none")
    if found != bytes(islice(cycle(range(0xD0, 0xD8)), len(found))):
        raise _Damage("garbage", "restart markers are missing or out of order")
    zeros = content.find(bytes(_NUM_SUSPECT), begin - 3, end)
    if (zeros >= 0 or count) and (fault := _decode_scan(jpeg, header, content[begin:end], zeros >= 0)):
        where = f"a block of zeros at byte {zeros}: " if zeros >= 0 else ""
        raise _Damage("garbage", f"{where}{fault}")


def _decode_scan(jpeg: _Jpeg, header: bytes, data: bytes, zeros: bool) -> str | None:
    """Count through the Huffman codes of one scan: what is wrong with it, or None. zeros: it has a long run.

    Values are skipped, not computed. This takes 20 ms for 90 kB, twenty times as long as decoding does.
    """
    first, last, refines = header[-3], min(header[-2], 63), header[-1] >> 4
    if jpeg.frame not in _HUFFMAN_FRAMES or (refines and first):
        return "no encoder writes so many there" if zeros else None
    if refines:
        return None  # one bit a block, any of which may be zero
    progressive = jpeg.frame == _PROGRESSIVE
    if not progressive:
        first, last = 0, 63
    try:
        components = [
            (jpeg.sampling[header[i]], divmod(header[i + 1], 16)) for i in range(1, len(header) - 3, 2)
        ]
        blocks: list[tuple[Codes, Codes]] = []  # of one unit, in their order in the data
        for (across, down), (dc, ac) in components:
            codes = _codes(jpeg, 0, dc) if first == 0 else [], _codes(jpeg, 1, ac) if last else []
            blocks += [codes] * (across * down if len(components) > 1 else 1)
        num_units = _num_units(jpeg, [factors for factors, _ in components])
    except (KeyError, IndexError, ValueError) as error:
        return f"the scan's header or tables are damaged: {error}"
    # an even colour is DC that stays or falls by one, then the end of the block; zeros that say anything else
    # would be hundreds of equal coefficients in a row
    if zeros and any((dc and dc[0][1] > 1) or (ac and ac[0][1] not in _ENDS) for dc, ac in blocks):
        return "they stand for no even colour"
    interval = jpeg.restart_interval or num_units
    stretches = _RESTART.split(data)[::2]  # the pattern's group puts the markers in between
    if len(stretches) != ceil(num_units / interval):
        return f"{len(stretches)} restart intervals, not {ceil(num_units / interval)}"
    for number, stretch in enumerate(stretches):
        units = min(interval, num_units - number * interval)
        if fault := _count_codes(
            stretch.replace(b"\xff\x00", b"\xff"), blocks, units, first, last, progressive
        ):
            return fault
    return None


def _num_units(jpeg: _Jpeg, scanned: list[tuple[int, int]]) -> int:
    """Coded units of a scan of components with these sampling factors (ITU T.81, A.2)."""
    across, down = (max(factors) for factors in zip(*jpeg.sampling.values(), strict=True))
    if len(scanned) > 1:
        return ceil(jpeg.width / (8 * across)) * ceil(jpeg.height / (8 * down))
    width, height = ceil(jpeg.width * scanned[0][0] / across), ceil(jpeg.height * scanned[0][1] / down)
    return ceil(width / 8) * ceil(height / 8)


def _codes(jpeg: _Jpeg, kind: int, slot: int) -> Codes:
    counts, symbols = jpeg.tables[kind, slot]
    codes: Codes = []
    lengths = chain.from_iterable([length] * count for length, count in enumerate(counts, 1))
    for length, symbol in zip(lengths, symbols, strict=True):
        codes += [(length, symbol)] * (1 << (16 - length))  # codes are assigned in ascending order
    if len(codes) > 1 << 16:
        raise ValueError("more codes than bits can tell apart")
    return codes + [(0, 0)] * ((1 << 16) - len(codes))


def _count_codes(
    data: bytes, blocks: list[tuple[Codes, Codes]], num_units: int, first: int, last: int, progressive: bool
) -> str | None:
    """Follow `num_units` times `blocks` through one restart interval; coefficients are first .. last."""
    # 24 bits from each byte on; no block is longer than the padding, so its end needs no watching inside it
    padded = np.frombuffer(data + bytes(300), np.uint8).astype(np.int64)
    words = ((padded[:-2] << 16) | (padded[1:-1] << 8) | padded[2:]).tolist()
    num_bits, position, skip = 8 * len(data), 0, 0  # skip: blocks without any further coefficient
    for unit in range(num_units):
        for dc, ac in blocks:
            if first == 0:
                length, size = dc[words[position >> 3] >> (8 - (position & 7)) & 0xFFFF]
                if not length or size > 15:
                    return f"no valid code in unit {unit} of {num_units}"
                position += length + size
            coefficient = max(first, 1)
            if skip:
                skip -= 1
                coefficient = last + 1
            while coefficient <= last:
                length, symbol = ac[words[position >> 3] >> (8 - (position & 7)) & 0xFFFF]
                if not length:
                    return f"no valid code in unit {unit} of {num_units}"
                run, size = symbol >> 4, symbol & 15
                position += length + size
                if size or run == 15:
                    coefficient += run + 1
                    continue
                if progressive and run:  # the end of this block and of up to 2^15 - 1 more
                    word = words[position >> 3] >> (8 - (position & 7)) & 0xFFFF
                    skip = (1 << run) - 1 + (word >> (16 - run))
                    position += run
                break
            if position > num_bits:
                return f"the data end in unit {unit} of {num_units}"
            if coefficient > last + 1:
                return f"more coefficients than a block has in unit {unit} of {num_units}"
    if skip:
        return f"{skip} blocks too many"
    if num_bits - position >= 16:  # up to 7 bits of padding; a byte more is known of good files
        return f"{(num_bits - position) // 8} bytes are left over"
    return None
