import gzip

import numpy as np
import pytest

from data.datasets.idx import read_idx

ARRAY = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
CONTENT = bytes([0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 4]) + ARRAY.tobytes()


def test_plain_and_gzipped(tmp_path):
    (tmp_path / "a").write_bytes(CONTENT)
    (tmp_path / "a.gz").write_bytes(gzip.compress(CONTENT))
    for name in ("a", "a.gz"):
        assert np.array_equal(read_idx(tmp_path / name), ARRAY)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an idx file"),
        (b"PK\x03\x04" + CONTENT, "not an idx file"),
        (bytes([0, 0, 13, 1]) + b"\0" * 8, "not an idx file of unsigned bytes"),
        (CONTENT[:9], "cut short within its header"),
        (CONTENT[:-1], "39 bytes where its header, shape \\(2, 3, 4\\), asks for 40"),
        (CONTENT + b"\0", "41 bytes where"),
    ],
)
def test_damaged_files_are_named(tmp_path, content, message):
    (tmp_path / "bad").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_idx(tmp_path / "bad")
    assert str(tmp_path / "bad") in str(caught.value)


@pytest.mark.parametrize(
    "damage", [lambda c: c[:-6], lambda c: c[:20] + b"\xff\xff" + c[22:], lambda c: b"no gzip"]
)
def test_damaged_gzip(tmp_path, damage):
    (tmp_path / "bad.gz").write_bytes(damage(gzip.compress(CONTENT)))
    with pytest.raises(ValueError, match=r"bad\.gz: damaged gzip file"):
        read_idx(tmp_path / "bad.gz")
