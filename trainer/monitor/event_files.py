"""TensorBoard's files of a run that goes on: what it is about to log again is taken out of them.

TensorBoard itself drops steps that are logged twice only where the names of the files, which begin with the
time, are in the order in which they were written. A clock that was set back breaks that.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event

from data.atomic import whole

_NAME, _KEPT = "events.out.tfevents.", ".kept"
_HEAD, _TAIL = 12, 4  # bytes around a record: its length and a checksum of that, a checksum of the record


def keep_until(folder: Path, step: int) -> bool:
    """Leave only the events up to `step` in the files of `folder`, and give them names that come before
    those of later files, whatever the clock says. Whether there was any file. Raises OSError."""
    files = [path for path in folder.glob(f"{_NAME}*") if path.is_file()]
    in_order = sorted(files, key=lambda path: (path.suffix != _KEPT, path.name))
    for number, path in enumerate(in_order):
        kept = folder / f"{_NAME}{0:010}.{number:04}{_KEPT}"
        path.rename(kept)
        content = kept.read_bytes()
        records = [record for record, at in _records(content) if at <= step]
        if sum(map(len, records)) < len(content):
            beside = folder / "kept.partial"  # not by a name that TensorBoard reads
            with whole(beside) as file:
                file.writelines(records)
            beside.replace(kept)
    return bool(files)


def _records(content: bytes) -> Iterator[tuple[bytes, int]]:
    """Each with what is around it, and its step. The last may be cut short by a kill; behind a damaged one
    TensorBoard does not read on either."""
    place = 0
    while place + _HEAD <= len(content):
        (length,) = struct.unpack_from("<Q", content, place)
        end = place + _HEAD + length + _TAIL
        if end > len(content):
            return
        try:
            step = Event.FromString(content[place + _HEAD : end - _TAIL]).step
        except Exception:  # protobuf's own, which differ between its versions
            return
        yield content[place:end], step
        place = end
