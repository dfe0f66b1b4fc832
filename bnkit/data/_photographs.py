"""Labelled photographs that stay in their files until a batch needs them."""

from __future__ import annotations

import io
import os
import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from .._checks import UserError, require
from ._augment import Augmentation
from ._decode import eight_bits
from ._source import Source, open_directory, open_zip
from ._transforms import evaluation_transform, training_transform
from ._tree import arrange

_SAMPLE = 256

Example = tuple[Tensor, int] | str
"""An image, uint8 (3, size, size), and its label; or why it can't be read."""


@dataclass(frozen=True, eq=False)
class Photographs:
    """Training and test photographs of a folder or an archive, of any sizes, read when they are needed.

    Attributes:
        name: the folder's.
        path: the folder, or a `.zip` archive.
        train_files, test_files: their paths in it.
        train_labels, test_labels: int64, (N,), indices into `classes`.
        classes: the classes' names.
        size: side of the squares that are cut out of them.
        skip_corrupt: leave photographs that can't be read out of their batches; else the first is an error.
    """

    name: str
    path: Path
    train_files: tuple[str, ...] = field(repr=False)
    train_labels: Tensor = field(repr=False)
    test_files: tuple[str, ...] = field(repr=False)
    test_labels: Tensor = field(repr=False)
    classes: tuple[str, ...]
    size: int
    skip_corrupt: bool = False

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        return 3, self.size, self.size

    @property
    def mean(self) -> Tensor:
        """Mean of each channel, scaled to [0, 1], over 256 training photographs, or all if there are fewer; (3,)."""
        return self._moments[0].clone()

    @property
    def std(self) -> Tensor:
        """Biased standard deviation of each channel over the photographs that `mean` is of; (3,)."""
        return self._moments[1].clone()

    def training_examples(self, augmentation: Augmentation, seed: int) -> Examples:
        """The training photographs by (index, epoch), each randomly changed as these and `seed` decide."""
        return Examples(self, self.train_files, self.train_labels, training_transform(augmentation, self.size), seed)

    def calibration_examples(self) -> Examples:
        """The training photographs as in a test."""
        return Examples(self, self.train_files, self.train_labels, evaluation_transform(self.size))

    def test_examples(self) -> Examples:
        """The test photographs: the short side resized to 256/224 of `size`, and the centre cropped."""
        return Examples(self, self.test_files, self.test_labels, evaluation_transform(self.size))

    @cached_property
    def _moments(self) -> tuple[Tensor, Tensor]:
        examples = self.calibration_examples()
        spread = range(0, len(examples), max(1, len(examples) // _SAMPLE))
        found = [examples[index, 0] for index in spread[:_SAMPLE]]
        images = [example[0] for example in found if not isinstance(example, str)]
        require(bool(images), f"none of the photographs tried in {self.path} can be read: mend or replace them.")
        pixels = torch.stack(images).double() / 255
        return pixels.mean((0, 2, 3)).float(), pixels.var((0, 2, 3), correction=0).sqrt().float()


class Examples(Dataset[Example]):
    """Photographs as a map-style `Dataset`, by (index, epoch). A worker opens the archive for itself."""

    def __init__(
        self,
        photographs: Photographs,
        files: tuple[str, ...],
        labels: Tensor,
        transform: Callable[[Image.Image], Tensor],
        seed: int = 0,
    ) -> None:
        self._path, self._least = photographs.path, 4 * photographs.size
        self._files, self._labels, self._transform, self._seed = files, labels, transform, seed
        self._source: tuple[int, Callable[[str], bytes]] | None = None

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, key: tuple[int, int]) -> Example:
        index, epoch = key
        try:
            image = self._open(self._files[index])
        except Exception as error:  # Pillow's readers raise what they come across.
            reason = " ".join(str(error).split()) or type(error).__name__
            return f"can't read the image {self._path / self._files[index]} ({reason})"
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(_mixed(self._seed, epoch, index))
            return self._transform(image), int(self._labels[index])

    def _open(self, file: str) -> Image.Image:
        with Image.open(io.BytesIO(self._reader()(file))) as image:
            # JPEG decodes to a half, a quarter or an eighth in a fraction of the time, which still is much larger than
            # what is cut out of it.
            image.draft(None, (self._least, self._least))
            return eight_bits(image).convert("RGB")

    def _reader(self) -> Callable[[str], bytes]:
        # Processes that share an open archive would move each other's place in it.
        if self._source is None or self._source[0] != os.getpid():
            self._source = os.getpid(), _opened(self._path)
        return self._source[1]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_source": None}


def _opened(path: Path) -> Callable[[str], bytes]:
    return open_zip(path).read if path.is_file() else lambda file: (path / file).read_bytes()


def _mixed(*numbers: int) -> int:
    return random.Random(repr(numbers)).getrandbits(63)


def photographs(
    path: str | os.PathLike[str], size: int = 224, *, skip_corrupt: bool = False, labels: bool = True
) -> Photographs:
    """The photographs in a folder or a `.zip` archive of class folders, arranged as `load` arranges them.

    Unlike `load`, this reads no image: they may be more than fit into memory. `fit` decodes them as it goes, in
    processes of their own.

    Args:
        path: one folder of images a class, or such folders in `train/` and `test/` (or `val/`).
        size: side of the squares cut out of the photographs: at random places and scales in training, if so
            augmented, and from the centre in tests.
        skip_corrupt: leave out photographs that can't be read, instead of stopping at the first.
        labels: False also takes photographs in no class folders, as `load` does.

    Raises:
        UserError: there is no such folder, or it is not as described.
    """
    require(size >= 1, f"the image size must be at least 1, got {size}: choose a larger one.")
    path = Path(path).expanduser()
    source = opened_source(path)
    arrangement = arrange(source, labels=labels)
    require(bool(arrangement.test), f"no test images in {path}: give at least one class two images or more.")
    train_files, train_labels = zip(*arrangement.train, strict=True)
    test_files, test_labels = zip(*arrangement.test, strict=True)
    return Photographs(
        name=path.resolve().name if path.is_dir() else path.stem,
        path=path.absolute(),
        train_files=train_files,
        train_labels=torch.tensor(train_labels),
        test_files=test_files,
        test_labels=torch.tensor(test_labels),
        classes=arrangement.classes,
        size=size,
        skip_corrupt=skip_corrupt,
    )


def opened_source(path: Path) -> Source:
    """The tree of images in a folder or an archive.

    Raises:
        UserError: it is neither.
    """
    require(
        path.is_dir() or (path.is_file() and path.suffix.lower() == ".zip"),
        f"{path} is neither a folder nor a .zip archive: give one with one folder of images per class.",
    )
    return open_directory(path) if path.is_dir() else open_zip(path)


def usual_side(path: str | os.PathLike[str]) -> int:
    """The median short side, in pixels, of up to 32 images spread over a folder or an archive.

    Raises:
        UserError: there are no images that can be read.
    """
    source = opened_source(Path(path).expanduser())
    sides = []
    for file in source.files[:: max(1, len(source.files) // 32)][:32]:
        try:
            with Image.open(io.BytesIO(source.read(file))) as image:
                sides.append(min(image.size))
        except Exception:  # reading it for training will tell
            continue
    if not sides:
        raise UserError(f"no images that can be read in {path}: give a folder with one folder of images per class.")
    return int(statistics.median(sides))
