"""Where image files come from: a folder on disk, or a zip archive that is never unpacked."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from .._checks import UserError

# torchvision.datasets.folder.IMG_EXTENSIONS
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Source:
    """A tree of image files.

    Attributes:
        path: the folder or archive.
        files: the images' paths in it, with "/", sorted.
        folders: the paths of the folders in it, with "/".
        read: the content of one of `files`.
    """

    path: Path
    files: tuple[str, ...]
    folders: frozenset[str]
    read: Callable[[str], bytes]


def open_directory(path: Path) -> Source:
    """The images in a folder on disk; symbolic links are followed.

    Raises:
        UserError: a folder in it can't be read.
    """
    files, folders = [], []
    for parent, children, names in os.walk(path, followlinks=True, onerror=_refuse):
        children[:] = filter(_visible, children)  # others may be unreadable
        prefix = Path(parent).relative_to(path)
        folders += [(prefix / child).as_posix() for child in children]
        files += [(prefix / name).as_posix() for name in names]
    return Source(path, _images(files), frozenset(folders), lambda file: (path / file).read_bytes())


def _refuse(error: OSError) -> None:
    raise UserError(f"can't read the folder {error.filename} ({error.strerror}): allow it, or remove it.") from error


def open_zip(path: Path) -> Source:
    """The images in a zip archive, which stays open as long as the result lives.

    Raises:
        UserError: it is not a zip archive, or can't be read.
    """
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"can't read {path} ({error}): give a zip archive of class folders.") from error
    names = archive.namelist()
    # An archive need not list its folders: they are whatever its entries stand in.
    leaves = {PurePosixPath(name.rpartition("/")[0]) for name in names}
    folders = {str(folder) for leaf in leaves for folder in (leaf, *leaf.parents)} - {"."}
    return Source(path, _images(names), frozenset(filter(_visible, folders)), archive.read)


def _images(files: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted({file for file in files if file.lower().endswith(IMAGE_SUFFIXES) and _visible(file)}))


def _visible(path: str) -> bool:
    """False for what file managers and version control leave behind: hidden files, macOS's resource forks."""
    return not any(part.startswith(".") or part == "__MACOSX" for part in path.split("/"))
