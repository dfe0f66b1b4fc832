from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from bnkit.data import ImageSet


def make(train: torch.Tensor) -> ImageSet:
    labels = torch.arange(len(train)) % 2
    return ImageSet("made", train, labels, train[:2], labels[:2], ("a", "b"))


def random_images(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_shape_and_number_of_classes():
    images = make(random_images(4, 3, 5, 7))
    assert images.shape == (3, 5, 7)
    assert images.num_classes == 2


def test_moments_are_those_of_float64_numpy():
    # Channels of different means, so that mixing them up would show.
    pixels = random_images(50, 3, 6, 5) // torch.tensor([1, 2, 5], dtype=torch.uint8).view(3, 1, 1)
    scaled = pixels.numpy().astype(np.float64) / 255
    images = make(pixels)
    assert images.mean.dtype == images.std.dtype == torch.float32
    np.testing.assert_allclose(images.mean.numpy(), scaled.mean((0, 2, 3)), rtol=1e-7)
    np.testing.assert_allclose(images.std.numpy(), scaled.std((0, 2, 3)), rtol=1e-7)


def test_moments_count_training_images_only():
    train, test = torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.full((2, 1, 2, 2), 255, dtype=torch.uint8)
    images = ImageSet("made", train, torch.zeros(4).long(), test, torch.zeros(2).long(), ("a",))
    assert images.mean.tolist() == [0]


def test_constant_channel_has_zero_deviation():
    images = make(torch.full((4, 1, 3, 3), 77, dtype=torch.uint8))
    assert images.mean.tolist() == [torch.tensor(77 / 255).item()]
    assert images.std.tolist() == [0]


def test_changing_the_returned_moments_changes_nothing():
    images = make(random_images(4, 1, 3, 3))
    before = images.mean.clone()
    images.mean.zero_()
    assert torch.equal(images.mean, before)


def test_it_is_frozen_and_its_repr_short():
    images = make(random_images(4, 1, 3, 3))
    assert repr(images) == "ImageSet(name='made', classes=('a', 'b'), skipped=())"
    with pytest.raises(dataclasses.FrozenInstanceError):
        images.name = "other"  # pyright: ignore[reportAttributeAccessIssue]
