"""From a decoded photograph to a square of pixels: torchvision's v2 transforms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ._augment import Augmentation

if TYPE_CHECKING:
    from PIL.Image import Image

_MARGIN = 256 / 224


def training_transform(augmentation: Augmentation, size: int) -> Callable[[Image], Tensor]:
    """Random changes of a photograph, to uint8 (3, size, size).

    `RandomResizedCrop`, `RandomHorizontalFlip` and `ColorJitter` of torchvision, as far as `augmentation` has them,
    then the rest of it. Without a resized crop the centre is cut out as in a test.
    """
    from torchvision.transforms import v2

    smallest, color = augmentation.resized_crop, augmentation.color
    parts: list[Any] = [v2.RandomResizedCrop(size, scale=(smallest, 1.0))] if smallest else _centre(size)
    if augmentation.flip:
        parts.append(v2.RandomHorizontalFlip())
    if color:
        parts.append(v2.ColorJitter(color, color, color))
    parts.append(v2.PILToTensor())
    rest = replace(augmentation, resized_crop=0.0, flip=False, color=0.0)
    rest.check_fits(size)  # here, since an error in a process that decodes comes with its traceback
    if str(rest) != "none":
        parts.append(_Batched(rest))
    return v2.Compose(parts)


def evaluation_transform(size: int) -> Callable[[Image], Tensor]:
    """The centre of a photograph, uint8 (3, size, size), after its short side became 256/224 of that."""
    from torchvision.transforms import v2

    return v2.Compose([*_centre(size), v2.PILToTensor()])


def _centre(size: int) -> list[Any]:
    from torchvision.transforms import v2

    return [v2.Resize(round(size * _MARGIN)), v2.CenterCrop(size)]


class _Batched:
    """An augmentation of batches, for one image."""

    def __init__(self, augmentation: Augmentation) -> None:
        self.augmentation = augmentation

    def __call__(self, image: Tensor) -> Tensor:
        changed = self.augmentation(image.unsqueeze(0)).squeeze(0)
        return changed.round().clamp(0, 255).byte() if changed.is_floating_point() else changed
