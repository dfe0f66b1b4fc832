"""Random changes of training images, a whole batch at a time."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from .._checks import UserError, require, unknown

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


@dataclass(frozen=True)
class Augmentation:
    """Random changes of training images, drawn anew for every image; in this order, each left out at 0.

    Args:
        resized_crop: smallest part of the area, in (0, 1), of a crop with an aspect ratio of 3/4 to 4/3 that is resized
            to the image's size (torchvision's v2 `RandomResizedCrop`); for photographs.
        crop: pixels by which the image moves at most, in both directions; it is continued by reflection at its border
            (He et al. 2015, "Deep Residual Learning", section 4.2, pads with zeros).
        shift: pixels by which the image moves at most, with zeros coming in; for digits.
        flip: mirror every second image left to right.
        rotate: degrees by which the image turns at most, with zeros coming in.
        color: strength c of changes of brightness, contrast and saturation, each by a factor in [1 - c, 1 + c].
        cutout: side of a square, centred anywhere in the image, that takes the image's mean colour
            (DeVries and Taylor 2017).

    Raises:
        UserError: a value out of range.
    """

    resized_crop: float = 0.0
    crop: int = 0
    shift: int = 0
    flip: bool = False
    rotate: float = 0.0
    color: float = 0.0
    cutout: int = 0

    def __post_init__(self) -> None:
        for name, most in (("resized_crop", 1), ("color", 1), ("rotate", 180)):
            value = getattr(self, name)
            require(
                isinstance(value, (int, float)) and 0 <= value <= most,
                f"{name} must be between 0 and {most}, got {value!r}: choose another or leave it out.",
            )
        for name in ("crop", "shift", "cutout"):
            value = getattr(self, name)
            require(
                isinstance(value, int) and not isinstance(value, bool) and value >= 0,
                f"{name} must be a number of pixels, got {value!r}: choose a whole number or leave it out.",
            )

    @classmethod
    def parse(cls, text: str) -> Augmentation:
        """The augmentation that a text such as `"crop=4,flip,cutout=8"` describes; `""` and `"none"` change nothing.

        Raises:
            UserError: an unknown name, a value that is no number or out of range.
        """
        fields = {field.name: field.type for field in dataclasses.fields(cls)}
        values: dict[str, float | bool] = {}
        for part in filter(None, (part.strip() for part in text.split(","))):
            name, separator, value = part.partition("=")
            name = name.strip().replace("-", "_")
            if part == "none":
                continue
            if name not in fields:
                raise unknown("augmentation", name, fields)
            require(
                bool(separator) != (name == "flip"),
                f"an augmentation is NAME=NUMBER, or flip alone, got {part!r}: write it like crop=4.",
            )
            values[name] = True if name == "flip" else _number(name, value)
        return cls(**values)  # pyright: ignore[reportArgumentType]

    def __str__(self) -> str:
        values = dataclasses.asdict(self)
        parts = [name if value is True else f"{name}={value:g}" for name, value in values.items() if value]
        return ",".join(parts) or "none"

    def check_fits(self, side: int) -> None:
        """Raise unless images of `side` pixels can be moved so far."""
        require(
            max(self.crop, self.shift) < side,
            f"crop and shift must be less than the image's side {side}, got {max(self.crop, self.shift)}: lower them.",
        )

    def __call__(self, images: Tensor) -> Tensor:
        """Changed copies of `images`, drawn from torch's global random numbers.

        Args:
            images: (N, C, H, W), uint8 values 0 to 255.

        Returns:
            The same shape, 0 to 255, of type uint8 or float32.
        """
        self.check_fits(min(images.shape[2:]))
        if self.resized_crop:
            images = _resized_crops(images, self.resized_crop)
        if self.crop or self.flip:
            images = _cropped(images, self.crop, self.flip)
        if self.shift:
            images = _shifted(images, self.shift)
        if self.rotate:
            images = _rotated(images, self.rotate)
        if self.color:
            images = _recolored(images, self.color)
        if self.cutout:
            images = _cut_out(images, self.cutout)
        return images


def _number(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise UserError(f"{name} must be a number, got {text!r}: write it like crop=4.") from None
    return int(value) if value.is_integer() else value


def _resized_crops(images: Tensor, smallest: float) -> Tensor:
    from torchvision.transforms import v2

    height, width = images.shape[2:]
    transform = v2.RandomResizedCrop((height, width), scale=(smallest, 1.0), antialias=True)
    return torch.stack([transform(image) for image in images])


def _offsets(images: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Rows (N, H) and columns (N, W) that each image's pixels come from, after a random move; some lie outside."""
    n, _, height, width = images.shape
    dy, dx = torch.randint(-most, most + 1, (2, n, 1), device=images.device)
    return torch.arange(height, device=images.device) + dy, torch.arange(width, device=images.device) + dx


def _taken(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    n, channels = images.shape[:2]
    image = torch.arange(n, device=images.device).view(-1, 1, 1, 1)
    channel = torch.arange(channels, device=images.device).view(1, -1, 1, 1)
    return images[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


def _cropped(images: Tensor, most: int, flip: bool) -> Tensor:
    height, width = images.shape[2:]
    rows, columns = _offsets(images, most)
    rows, columns = _reflected(rows, height), _reflected(columns, width)
    if flip:
        mirrored = torch.rand(len(images), 1, device=images.device) < 0.5
        columns = torch.where(mirrored, width - 1 - columns, columns)
    return _taken(images, rows, columns)


def _reflected(index: Tensor, size: int) -> Tensor:
    """Indices beyond either end, mirrored at it without repeating the border."""
    return (size - 1) - (size - 1 - index.abs()).abs()


def _shifted(images: Tensor, most: int) -> Tensor:
    height, width = images.shape[2:]
    rows, columns = _offsets(images, most)
    outside = ((rows < 0) | (rows >= height))[:, None, :, None] | ((columns < 0) | (columns >= width))[:, None, None, :]
    return _taken(images, rows.clamp(0, height - 1), columns.clamp(0, width - 1)).masked_fill(outside, 0)


def _rotated(images: Tensor, most: float) -> Tensor:
    n, _, height, width = images.shape
    angle = (2 * torch.rand(n, device=images.device) - 1) * math.radians(most)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    # In affine_grid's coordinates each side is 2 long, whatever the image's proportions.
    rows = [torch.stack([cos, sin * height / width, zero], 1), torch.stack([-sin * width / height, cos, zero], 1)]
    grid = affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return grid_sample(images.float(), grid, align_corners=False)


def _recolored(images: Tensor, strength: float) -> Tensor:
    channels = images.shape[1]
    factors = 1 + strength * (2 * torch.rand(3, len(images), 1, 1, 1, device=images.device) - 1)
    brightness, contrast, saturation = factors
    values = images.float() * brightness
    values = torch.lerp(values.mean((1, 2, 3), keepdim=True), values, contrast)
    if channels == 3:
        luma = torch.tensor(_LUMA, device=images.device).view(1, 3, 1, 1)
        values = torch.lerp((values * luma).sum(1, keepdim=True), values, saturation)
    return values.clamp_(0, 255)


def _cut_out(images: Tensor, side: int) -> Tensor:
    n, _, height, width = images.shape

    def covered(size: int) -> Tensor:
        first = torch.randint(size, (n, 1), device=images.device) - side // 2
        index = torch.arange(size, device=images.device)
        return (index >= first) & (index < first + side)

    hole = covered(height)[:, None, :, None] & covered(width)[:, None, None, :]
    mean = images.float().mean((2, 3), keepdim=True).to(images.dtype)
    return torch.where(hole, mean, images)
