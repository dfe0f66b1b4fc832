"""The IDX files that MNIST and Fashion-MNIST come in."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np

from .._checks import UserError

FILES = tuple(f"{split}-{kind}-ubyte" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))


def find_idx(folder: Path, name: str) -> Path | None:
    """The file `name` in `folder`, plain or else gzipped; None where there is neither."""
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def read_idx(path: Path) -> np.ndarray:
    """The array of unsigned bytes in an IDX file, gzipped if its name ends in `.gz`.

    Format: two zero bytes, the type (8: unsigned byte), the number of dimensions d; d big-endian 32-bit sizes; then
    the bytes, last dimension fastest.

    Raises:
        UserError: the file can't be read, or is not a complete IDX file.
    """
    try:
        content = path.read_bytes()
        return _parse(gzip.decompress(content) if path.suffix == ".gz" else content)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise UserError(
            f"can't read {path} ({error}): delete it and get it anew, for instance with --download."
        ) from error


def _parse(content: bytes) -> np.ndarray:
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise ValueError("it is not an IDX file of bytes")
    start = 4 + 4 * content[3]
    shape = np.frombuffer(content[4:start], dtype=">u4").tolist()
    # A copy, since arrays on a `bytes` object are read-only and torch has no such tensors.
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape).copy()
