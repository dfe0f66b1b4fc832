"""A data set from class folders of image files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .._checks import UserError, require
from ._decode import decode
from ._image_set import ImageSet
from ._source import Source, open_directory, open_zip
from ._tree import arrange

Progress = Callable[[int, int], None]


def load_folder(
    path: Path, size: int, skip_corrupt: bool, progress: Progress | None, *, labels: bool = True
) -> ImageSet:
    """Read class folders of images, in a folder or a zip archive; `arrange` says what is of which class and split.

    The images become RGB, or gray if all of them are.

    Arguments:
        path: the folder, or the archive.
        size: side of the square images made by `decode`.
        skip_corrupt: leave out files that can't be read, and name them in `skipped`; else the first is an error.
        progress: called with the number of files read and the number of all.
        labels: see `arrange`.

    Raises:
        UserError: see `arrange`; or a file can't be read; or, without those, a class has no training image or no
            class a test image.
    """
    source = open_directory(path) if path.is_dir() else open_zip(path)
    arrangement = arrange(source, labels=labels)
    reader = _Reader(source, size, skip_corrupt, len(arrangement.train) + len(arrangement.test), progress)
    train_images, train_labels = reader.read(arrangement.train)
    test_images, test_labels = reader.read(arrangement.test)
    for label, name in enumerate(arrangement.classes):
        require(
            bool((train_labels == label).any()),
            f"no readable training image of the class {name!r} in {path}: add some or remove the class.",
        )
    require(len(test_labels) > 0, f"no test images in {path}: give at least one class two images or more.")
    channels = 1 if reader.all_gray else 3
    return ImageSet(
        name=path.resolve().name if path.is_dir() else path.stem,
        train_images=train_images[:, :channels].contiguous(),
        train_labels=train_labels,
        test_images=test_images[:, :channels].contiguous(),
        test_labels=test_labels,
        classes=arrangement.classes,
        skipped=tuple(reader.skipped),
    )


class _Reader:
    """Decodes files; keeps count, the files it skipped, and whether all images so far were gray."""

    def __init__(self, source: Source, size: int, skip_corrupt: bool, total: int, progress: Progress | None) -> None:
        self._source, self._size, self._skip_corrupt = source, size, skip_corrupt
        self._total, self._progress = total, progress
        self._done = 0
        self.skipped: list[str] = []
        self.all_gray = True

    def read(self, examples: Sequence[tuple[str, int]]) -> tuple[Tensor, Tensor]:
        """Images as RGB, uint8 (N, 3, size, size), and their labels."""
        images = np.empty((len(examples), 3, self._size, self._size), dtype=np.uint8)
        labels: list[int] = []
        for file, label in examples:
            pixels = self._decode(file)
            if pixels is not None:
                images[len(labels)] = pixels
                labels.append(label)
                self.all_gray = self.all_gray and len(pixels) == 1
            self._done += 1
            if self._progress is not None:
                self._progress(self._done, self._total)
        return torch.from_numpy(images[: len(labels)]), torch.tensor(labels, dtype=torch.int64)

    def _decode(self, file: str) -> np.ndarray | None:
        try:
            return decode(self._source.read(file), self._size)
        except Exception as error:
            if not self._skip_corrupt:
                reason = " ".join(str(error).split()) or type(error).__name__
                raise UserError(
                    f"can't read the image {self._source.path / file} ({reason}): "
                    "replace or remove it, or leave such files out with --skip-corrupt (skip_corrupt=True)."
                ) from error
            self.skipped.append(file)
            return None
