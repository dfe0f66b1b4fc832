"""Data sets by name, in the folders where torchvision keeps them."""

from __future__ import annotations

import contextlib
import io
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._checks import UserError, require
from ._idx import FILES, find_idx, read_idx
from ._image_set import ImageSet

_CLASSES = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "cifar10": "CIFAR10", "cifar100": "CIFAR100"}
_LABELS = {
    "mnist": tuple("0123456789"),
    "fashion-mnist": (
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ),
}
NAMES = tuple(_CLASSES)


def load_torchvision(name: str, root: Path, download: bool) -> ImageSet:
    """The data set `name` of `NAMES` from torchvision's folder for it under `root`.

    MNIST and Fashion-MNIST are read from `root/MNIST/raw` and `root/FashionMNIST/raw`, gzipped or not; CIFAR from
    `root/cifar-10-batches-py` and `root/cifar-100-python`.

    Arguments:
        name: one of `NAMES`.
        root: torchvision's root folder.
        download: fetch with torchvision what is missing; an archive that is there already is only unpacked.

    Raises:
        UserError: the data set is missing or damaged, or the download failed.
    """
    return _load_idx(name, root, download) if name in _LABELS else _load_cifar(name, root, download)


def _load_idx(name: str, root: Path, download: bool) -> ImageSet:
    # Reading these needs no torchvision, whose import takes seconds.
    folder = root / _CLASSES[name] / "raw"
    if download and not all(find_idx(folder, file) for file in FILES):
        _torchvision_set(name, root, train=True, download=True)
    paths = [path for file in FILES if (path := find_idx(folder, file))]
    require(len(paths) == len(FILES), _missing(name, folder))
    arrays = [torch.from_numpy(read_idx(path)) for path in paths]
    for images, labels in (arrays[:2], arrays[2:]):
        require(
            images.shape == (len(labels), 28, 28),
            f"images and labels in {folder} don't belong together ({tuple(images.shape)} and {tuple(labels.shape)}): "
            "delete them and pass --download.",
        )
        require(
            not (labels >= len(_LABELS[name])).any(),
            f"the labels in {folder} must be less than {len(_LABELS[name])}, got {labels.max()}: "
            "the file is damaged, delete it and pass --download.",
        )
    return ImageSet(
        name=name,
        train_images=arrays[0].unsqueeze(1),
        train_labels=arrays[1].long(),
        test_images=arrays[2].unsqueeze(1),
        test_labels=arrays[3].long(),
        classes=_LABELS[name],
    )


def _load_cifar(name: str, root: Path, download: bool) -> ImageSet:
    train = _torchvision_set(name, root, train=True, download=download)
    test = _torchvision_set(name, root, train=False, download=False)
    return ImageSet(
        name=name,
        train_images=_channels_first(train.data),
        train_labels=torch.tensor(train.targets),
        test_images=_channels_first(test.data),
        test_labels=torch.tensor(test.targets),
        classes=tuple(train.classes),
    )


def _channels_first(images: Any) -> Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def _torchvision_set(name: str, root: Path, *, train: bool, download: bool) -> Any:
    from torchvision import datasets

    dataset = getattr(datasets, _CLASSES[name])
    try:
        # torchvision prints its progress; what appears on screen is the caller's to decide.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return dataset(root, train=train, download=download)
    except (RuntimeError, OSError, HTTPException) as error:
        if not download:
            raise UserError(_missing(name, root / dataset.base_folder)) from error
        reason = " ".join(str(error).split())
        raise UserError(
            f"can't download {name} to {root} ({reason}): check network and folder, and try again."
        ) from error


def _missing(name: str, folder: Path) -> str:
    return (
        f"no complete {name} in {folder.absolute()}: "
        "say where it is with --data-dir, or fetch it with --download (data_dir=, download=True)."
    )
