"""The bundled data: MNIST's 70,000 digits in black and white."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .._checks import UserError, require
from ._image_set import ImageSet

PATH = Path(__file__).with_name("digits.npz")
SHA256 = "a2c640605595723215af32ec0d46cb4fc583b3f81244ae346d2b37521a62f823"


def load_digits() -> ImageSet:
    """MNIST binarized: a pixel of 128 or more is 255, any other is 0. 60,000 training and 10,000 test images, 28×28.

    The file is made by `scripts/make_digits.py`: an image row's 28 bits stand in 4 bytes, the highest bit left.

    Raises:
        UserError: the file is missing or not the one this version was released with.
    """
    try:
        content = PATH.read_bytes()
    except OSError as error:
        raise UserError(f"can't read the bundled digits {PATH} ({error.strerror}): reinstall bnkit.") from error
    require(
        hashlib.sha256(content).hexdigest() == SHA256,
        f"the bundled digits {PATH} are damaged (their SHA-256 differs): reinstall bnkit.",
    )
    with np.load(io.BytesIO(content)) as arrays:
        return ImageSet(
            name="digits",
            train_images=_unpack(arrays["train_images"]),
            train_labels=torch.from_numpy(arrays["train_labels"]).long(),
            test_images=_unpack(arrays["test_images"]),
            test_labels=torch.from_numpy(arrays["test_labels"]).long(),
            classes=tuple("0123456789"),
        )


def _unpack(rows: np.ndarray) -> Tensor:
    """(N, 28, 4) bytes to (N, 1, 28, 28) pixels of 0 or 255."""
    pixels = np.unpackbits(rows, axis=2, count=28)
    pixels *= 255
    return torch.from_numpy(pixels).unsqueeze(1)
