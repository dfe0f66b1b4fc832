from __future__ import annotations

import pytest
import torch

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
