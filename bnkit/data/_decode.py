"""From an image file's bytes to a square of pixels."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image


def decode(content: bytes, size: int) -> np.ndarray:
    """Decode an image file; resize its short side to `size`, antialiased bilinear; crop the centre square.

    Sizes and offsets are rounded as by torchvision's `Resize` and `CenterCrop`. Colour becomes RGB; an alpha channel
    and the camera's orientation tag are ignored; 16-bit gray is scaled to 8 bits.

    Returns:
        uint8, (3, size, size), or (1, size, size) for a gray image.

    Raises:
        Exception: of any kind, where the file is damaged: Pillow's readers raise what they come across.
    """
    with Image.open(io.BytesIO(content)) as file:
        image = eight_bits(file)
    width, height = image.size
    short = min(width, height)
    if short != size:
        image = image.resize((size * width // short, size * height // short), Image.Resampling.BILINEAR)
    left, top = (round((side - size) / 2) for side in image.size)
    image = image.crop((left, top, left + size, top + size))
    return np.atleast_3d(np.asarray(image)).transpose(2, 0, 1)


def eight_bits(image: Image.Image) -> Image.Image:
    """`image` as RGB or gray of 8 bits; loads it."""
    # In files of these kinds gray of type I has 16 bits: always in PPM's, before Pillow 11 in PNG's.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        # Pillow's own conversion cuts off at 255, which turns nearly every such image white.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of type {image.mode} have no fixed range")
    return image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
