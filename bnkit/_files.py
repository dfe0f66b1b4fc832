"""Files that are complete or absent: written aside, then renamed."""

from __future__ import annotations

import contextlib
import os
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from ._checks import UserError, require


@contextlib.contextmanager
def written_aside(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it replaces `path` in one step, else it is removed.

    Raises:
        UserError: the folder can't be made or written.
    """
    target = Path(path)
    require(not target.is_dir(), f"can't write {target}: it is a folder; name a file.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    except OSError as error:
        raise UserError(f"can't write {target}: {error.strerror or error}; choose another folder.") from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes the file private; give it the permissions any other new file would have.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` as UTF-8 to `path`, whole or not at all."""
    with written_aside(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def damaged_entry(path: str | os.PathLike[str]) -> str | None:
    """The first entry of a zip archive, such as `torch.save` writes, that differs from its checksum.

    None where there is none, and for files of another kind. `torch.load` reads what the bytes say without a check.
    """
    if not zipfile.is_zipfile(path):
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip()
    except (OSError, ValueError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error):
        return "the list of entries"


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Make `folder` if need be and see that a file can be written there, before hours of work depend on it.

    Raises:
        UserError: it can't.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"can't write to the folder {folder}: {error.strerror or error}; choose another.") from error
