from __future__ import annotations

import math

import pytest
import torch

from bnkit._checks import UserError
from bnkit.data import Augmentation


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def numbered(n: int = 40, channels: int = 3, height: int = 9, width: int = 7) -> torch.Tensor:
    """Images whose pixels are all different within a channel."""
    return (
        (torch.arange(height * width).view(1, 1, height, width) + 60 * torch.arange(channels).view(-1, 1, 1))
        .expand(n, -1, -1, -1)
        .to(torch.uint8)
    )


def test_nothing_changes_nothing():
    images = numbered()
    assert torch.equal(Augmentation()(images), images)
    assert Augmentation.parse("none") == Augmentation.parse("") == Augmentation()


def test_flip_mirrors_every_second_image():
    images = numbered(400)
    out = Augmentation(flip=True)(images)
    mirrored = [torch.equal(image, images[0].flip(-1)) for image in out]
    kept = [torch.equal(image, images[0]) for image in out]
    assert sum(mirrored) + sum(kept) == 400
    assert 150 < sum(mirrored) < 250


def test_crop_is_a_window_of_the_reflected_image():
    images, most = numbered(400), 2
    padded = torch.nn.functional.pad(images[:1].float(), (most,) * 4, mode="reflect").to(torch.uint8)[0]
    windows = {
        padded[:, y : y + 9, x : x + 7].numpy().tobytes() for y in range(2 * most + 1) for x in range(2 * most + 1)
    }
    seen = {image.numpy().tobytes() for image in Augmentation(crop=most)(images).contiguous()}
    assert seen == windows


def test_shift_brings_zeros_in():
    images, most = numbered(400) + 1, 2
    padded = torch.nn.functional.pad(images[0], (most,) * 4)
    windows = {
        padded[:, y : y + 9, x : x + 7].numpy().tobytes() for y in range(2 * most + 1) for x in range(2 * most + 1)
    }
    seen = {image.numpy().tobytes() for image in Augmentation(shift=most)(images).contiguous()}
    assert seen == windows


def test_rotation_keeps_the_centre_and_turns_around_it(monkeypatch: pytest.MonkeyPatch):
    image = torch.zeros(1, 1, 9, 15, dtype=torch.uint8)
    image[0, 0, 4, 7 + 3] = 255  # three pixels to the right of the centre
    monkeypatch.setattr(torch, "rand", lambda n, device: torch.ones(n, device=device))
    out = Augmentation(rotate=90)(image)
    assert out.shape == image.shape
    (y,), (x,) = torch.where(out[0, 0] > 128)
    assert x == 7
    assert abs(int(y) - 4) == 3  # a distance in pixels, also where the image is not square


def test_rotation_by_nearly_nothing_is_nearly_nothing():
    images = numbered()
    assert (Augmentation(rotate=1e-4)(images) - images.float()).abs().max() < 0.01


def test_color_scales_brightness_contrast_and_saturation(monkeypatch: pytest.MonkeyPatch):
    images = torch.randint(40, 200, (2, 3, 5, 5), dtype=torch.uint8)
    draws = torch.tensor([0.75, 0.25, 0.6]).view(3, 1, 1, 1, 1).expand(3, 2, 1, 1, 1)
    monkeypatch.setattr(torch, "rand", lambda *shape, device: draws)
    out = Augmentation(color=0.4)(images)
    expected = images.double() * 1.2
    mean = expected.mean((1, 2, 3), keepdim=True)
    expected = mean + (expected - mean) * 0.8
    grey = (expected * torch.tensor([0.299, 0.587, 0.114]).double().view(3, 1, 1)).sum(1, keepdim=True)
    expected = (grey + (expected - grey) * 1.08).clamp(0, 255)
    torch.testing.assert_close(out.double(), expected, atol=1e-3, rtol=0)


def test_grey_images_have_no_saturation():
    out = Augmentation(color=0.5)(numbered(channels=1))
    assert out.shape == (40, 1, 9, 7)
    assert 0 <= out.min() <= out.max() <= 255


def test_cutout_covers_a_square_with_the_mean():
    images = torch.randint(0, 100, (300, 3, 12, 10), dtype=torch.uint8)
    images[:, :, 0, 0] = 255  # so that no pixel but a covered one equals the mean by accident too often
    out = Augmentation(cutout=4)(images)
    changed = (out != images).any(1)
    areas = changed.flatten(1).sum(1)
    assert areas.max() <= 16
    assert areas.max() >= 15
    for before, after, where in zip(images, out, changed, strict=True):
        mean = before.float().mean((1, 2)).to(torch.uint8)
        assert (after[:, where] == mean[:, None]).all()
    assert (changed[:, 0].any(1).float().mean() > 0.1).item()  # some squares reach over the border


def test_resized_crops_are_torchvisions():
    from torchvision.transforms import v2

    images = torch.randint(0, 256, (3, 3, 16, 20), dtype=torch.uint8)
    torch.manual_seed(1)
    out = Augmentation(resized_crop=0.2)(images)
    torch.manual_seed(1)
    transform = v2.RandomResizedCrop((16, 20), scale=(0.2, 1.0), antialias=True)
    assert torch.equal(out, torch.stack([transform(image) for image in images]))


def test_the_same_seed_draws_the_same():
    augmentation = Augmentation.parse("crop=2,flip,rotate=10,color=0.2,cutout=3")
    torch.manual_seed(3)
    first = augmentation(numbered())
    torch.manual_seed(3)
    assert torch.equal(first, augmentation(numbered()))


def test_images_are_independent_of_their_place_in_memory():
    images = numbered()
    torch.manual_seed(3)
    first = Augmentation(crop=2, flip=True)(images)
    torch.manual_seed(3)
    second = Augmentation(crop=2, flip=True)(images.contiguous(memory_format=torch.channels_last))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("text", "augmentation"),
    [
        ("crop=4,flip", Augmentation(crop=4, flip=True)),
        (" resized-crop=0.3 , cutout=8", Augmentation(resized_crop=0.3, cutout=8)),
        ("rotate=15,color=0.4,shift=2", Augmentation(rotate=15, color=0.4, shift=2)),
    ],
)
def test_text(text: str, augmentation: Augmentation):
    assert Augmentation.parse(text) == augmentation
    assert Augmentation.parse(str(augmentation)) == augmentation


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("crap=4", "unknown augmentation 'crap': did you mean crop"),
        ("crop", "NAME=NUMBER, or flip alone, got 'crop'"),
        ("flip=1", "NAME=NUMBER, or flip alone, got 'flip=1'"),
        ("crop=four", "crop must be a number, got 'four'"),
        ("crop=1.5", r"crop must be a number of pixels, got 1\.5"),
        ("cutout=-1", "cutout must be a number of pixels, got -1"),
        ("color=2", "color must be between 0 and 1, got 2"),
        ("rotate=nan", "rotate must be between 0 and 180, got nan"),
    ],
)
def test_mistakes(text: str, words: str):
    with pytest.raises(UserError, match=words):
        Augmentation.parse(text)


def test_a_crop_as_large_as_the_image():
    with pytest.raises(UserError, match="less than the image's side 7, got 7: lower them"):
        Augmentation(crop=7)(numbered())
    assert math.isfinite(Augmentation(crop=6)(numbered()).float().mean())
