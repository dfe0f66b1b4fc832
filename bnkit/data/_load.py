"""One name or path, one image set."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from .._checks import UserError, require, unknown
from ._digits import load_digits
from ._folder import Progress, load_folder
from ._image_set import ImageSet
from ._torchvision import NAMES, load_torchvision

_DEFAULT_SIZE = 32
_DEFAULT_DATA_DIR = "data"


def names() -> tuple[str, ...]:
    """The names that `load` knows."""
    return ("digits", *NAMES)


def load(
    name_or_path: str | os.PathLike[str],
    *,
    data_dir: str | os.PathLike[str] | None = None,
    download: bool = False,
    size: int | None = None,
    skip_corrupt: bool = False,
    labels: bool = True,
    progress: Progress | None = None,
) -> ImageSet:
    """Load a whole data set into memory.

    - `"digits"`: bundled; MNIST in black and white.
    - `"mnist"`, `"fashion-mnist"`, `"cifar10"`, `"cifar100"`: found under `data_dir`, where torchvision keeps them.
    - the path of a folder, or of a `.zip` archive, with one folder of images per class, or with such folders in
      `train/` and `test/` (or `val/`). Without these a fifth of each class is for testing, chosen by file name.
      A folder named like one of the sets above is meant by writing `./` before it.

    Arguments:
        name_or_path: see above.
        data_dir: where data sets other than the bundled are looked for; default `data` in the current folder.
        download: fetch the data set into `data_dir` if it is not there.
        size: height and width of the images. Default: as they are, and 32 for folders. Images from folders keep
            their aspect ratio: the short side is resized, then the centre cropped. Resizing is antialiased.
        skip_corrupt: leave out image files of a folder that can't be read; `ImageSet.skipped` names them.
        labels: False also takes a folder of images without class folders, as one class, all of them for training and
            all for testing.
        progress: called with the number of image files of a folder read so far and the number of all.

    Raises:
        UserError: there is no such data set or folder, or it is not as described; the message says what to do.
    """
    require(size is None or size >= 1, f"the image size must be at least 1, got {size}: choose a larger one.")
    name = os.fspath(name_or_path)
    if name not in names():
        return load_folder(_existing(name), size or _DEFAULT_SIZE, skip_corrupt, progress, labels=labels)
    if name == "digits":
        images = load_digits()
    else:
        images = load_torchvision(name, Path(data_dir or _DEFAULT_DATA_DIR).expanduser(), download)
    return images if size is None else _resized(images, size)


def _existing(text: str) -> Path:
    path = Path(text).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix.lower() == ".zip"):
        return path
    if path.exists():
        raise UserError(f"{text} is neither a folder nor a .zip archive: give a folder with one folder per class.")
    if path.suffix.lower() == ".zip" or len(path.parts) > 1 or text.startswith((".", "~")):
        raise UserError(f"no such folder: {text}; check the path.")
    raise unknown("data set", text, names())


def _resized(images: ImageSet, size: int) -> ImageSet:
    return replace(
        images,
        train_images=_resize(images.train_images, size),
        test_images=_resize(images.test_images, size),
    )


def _resize(images: Tensor, size: int) -> Tensor:
    # In pieces, since interpolation may hold its whole input in another format.
    parts = [interpolate(part, size=(size, size), mode="bilinear", antialias=True) for part in images.split(4096)]
    return torch.cat(parts)
