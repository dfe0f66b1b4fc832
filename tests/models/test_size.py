from __future__ import annotations

import pytest
import torch

from bnkit import models
from bnkit._checks import UserError
from bnkit.models._size import check_image_size, check_images


def test_a_size_too_small_names_the_smallest() -> None:
    check_image_size(9, 9, "net")
    with pytest.raises(UserError, match=r"^net needs images of 9 pixels a side or more, got image_size=8: resize"):
        check_image_size(8, 9, "net")
    with pytest.raises(UserError, match="9 pixels"):
        check_image_size(32.5, 9, "net")  # pyright: ignore[reportArgumentType]


def test_images_too_small_or_of_another_form() -> None:
    check_images(torch.empty(2, 1, 9, 30), 9, "net")
    with pytest.raises(UserError, match=r"^this net needs images of 9 pixels a side or more, got 30×8: resize"):
        check_images(torch.empty(2, 1, 30, 8), 9, "net")
    with pytest.raises(UserError, match=r"takes images \(N, C, H, W\), got shape \(9, 9\)"):
        check_images(torch.empty(9, 9), 9, "net")


@pytest.mark.parametrize(("name", "side"), [("lenet5", 28), ("lenet5_1998", 32)])
def test_images_of_another_size_than_the_model_s(name: str, side: int) -> None:
    model = models.create(name, num_classes=10, in_channels=1).eval()
    assert model(torch.zeros(2, 1, side, side)).shape == (2, 10)
    for other in ((2, 1, 24, 24), (2, 1, side, side + 1)):
        words = rf"^this {name} takes images of {side}×{side}, got {other[2]}×{other[3]}: .* image_size="
        with pytest.raises(UserError, match=words):
            model(torch.zeros(other))
    with pytest.raises(UserError, match=r"takes images \(N, C, H, W\), got shape \(28,\)"):
        model(torch.zeros(28))


def test_images_with_other_values_than_the_model_s() -> None:
    model = models.create("mlp", num_classes=10, in_channels=1).eval()
    assert torch.equal(model(torch.ones(2, 1, 28, 28)), model(torch.ones(2, 784)))
    for other in ((2, 1, 32, 32), (2, 3, 28, 28), (28,), (784,)):
        with pytest.raises(
            UserError, match=r"^this mlp takes images \(1, 28, 28\), each with 784 .*, got .* image_size="
        ):
            model(torch.zeros(other))
