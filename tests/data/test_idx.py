from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from bnkit._checks import UserError
from bnkit.data._idx import find_idx, read_idx

VALUES = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
CONTENT = bytes([0, 0, 8, 3]) + struct.pack(">3I", 2, 3, 4) + VALUES.tobytes()


def test_plain_and_gzipped_files_read_the_same(tmp_path: Path):
    plain, packed = tmp_path / "a", tmp_path / "b.gz"
    plain.write_bytes(CONTENT)
    packed.write_bytes(gzip.compress(CONTENT))
    for path in (plain, packed):
        array = read_idx(path)
        np.testing.assert_array_equal(array, VALUES)
        assert array.flags.writeable


def test_plain_files_are_preferred(tmp_path: Path):
    assert find_idx(tmp_path, "a") is None
    (tmp_path / "a.gz").touch()
    assert find_idx(tmp_path, "a") == tmp_path / "a.gz"
    (tmp_path / "a").touch()
    assert find_idx(tmp_path, "a") == tmp_path / "a"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty", b""),
        ("truncated", CONTENT[:-1]),
        ("truncated-header", CONTENT[:9]),
        ("too-long", CONTENT + b"\0"),
        ("floats", b"\0\0\x0d" + CONTENT[3:]),
        ("no-gzip.gz", CONTENT),
        ("truncated.gz", gzip.compress(CONTENT)[:-12]),
    ],
    # A gzip file carries the time it was packed at, so its bytes would make another name in each xdist worker.
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_damaged_files_are_named(tmp_path: Path, name: str, content: bytes):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"can't read .*{name} \(.+\): delete it"):
        read_idx(tmp_path / name)
