from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, Resize

from bnkit.data._decode import decode


def noise(height: int, width: int, *channels: int, dtype: type = np.uint8, top: int = 256) -> np.ndarray:
    return np.random.default_rng(0).integers(0, top, (height, width, *channels), dtype=dtype)


def encoded(image: Image.Image, kind: str = "png", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("height", "width"),
    [
        (32, 32),  # as it is
        (50, 32),  # only cropped
        (40, 61),  # shrunk, odd crop
        (61, 40),
        (7, 9),  # enlarged
        (1, 5),
        (201, 333),
    ],
)
@pytest.mark.parametrize("size", [32, 9])
def test_it_resizes_and_crops_as_torchvision(height: int, width: int, size: int):
    image = Image.fromarray(noise(height, width, 3))
    expected = np.asarray(Compose([Resize(size), CenterCrop(size)])(image))
    np.testing.assert_array_equal(decode(encoded(image), size), expected.transpose(2, 0, 1))


def test_jpeg():
    image = Image.fromarray(noise(8, 8, 3))
    content = encoded(image, "jpeg", quality=90)
    expected = np.asarray(Image.open(io.BytesIO(content)))
    np.testing.assert_array_equal(decode(content, 8), expected.transpose(2, 0, 1))


def test_gray_has_one_channel():
    pixels = noise(8, 8)
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(pixels)), 8), pixels[None])


def test_black_and_white_is_0_and_255():
    pixels = noise(8, 8, top=2).astype(bool)
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(pixels)), 8), 255 * pixels[None])


def test_sixteen_bits_are_scaled_not_cut():
    pixels = noise(8, 8, dtype=np.uint16, top=65536)
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(pixels)), 8), pixels[None] // 256)


@pytest.mark.parametrize("top", [65535, 1023])
def test_sixteen_bits_of_a_portable_graymap(top: int):
    pixels = noise(8, 8, dtype=np.uint16, top=top + 1)
    content = f"P5\n8 8\n{top}\n".encode() + pixels.astype(">u2").tobytes()
    found = decode(content, 8)[0].astype(float)
    np.testing.assert_allclose(found, pixels * (65535 / top) // 256, atol=1 if top < 65535 else 0)


def test_alpha_is_ignored():
    pixels = noise(8, 8, 4)
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(pixels)), 8), pixels[..., :3].transpose(2, 0, 1))


def test_gray_with_alpha_stays_gray():
    pixels = noise(8, 8, 2)
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(pixels)), 8), pixels[..., 0][None])


def test_a_palette_becomes_colour():
    image = Image.fromarray(noise(8, 8, 3)).quantize(7)
    expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(decode(encoded(image), 8), expected.transpose(2, 0, 1))


def test_floating_point_pixels_are_refused():
    image = Image.fromarray(np.zeros((8, 8), np.float32))
    with pytest.raises(ValueError, match="pixels of type F have no fixed range"):
        decode(encoded(image, "tiff"), 8)


@pytest.mark.parametrize("kind", ["png", "jpeg"])
def test_truncated_files_raise(kind: str):
    content = encoded(Image.fromarray(noise(32, 32, 3)), kind)
    with pytest.raises(OSError, match=r"truncated|broken"):
        decode(content[: len(content) // 2], 32)
