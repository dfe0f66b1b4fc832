"""U-Net: from images to a map of classes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._checks import require
from ._activation import Activation
from ._conv_norm import ConvNorm, ConvStyle
from ._init import Init, conv2d, conv_transpose2d
from ._norm import Norm
from ._registry import register
from ._size import check_image_size, check_images


class UNet(nn.Module):
    """Contracting and expanding stages with shortcuts between those of one size (Ronneberger et al. 2015, figure 1).

    Each stage is two 3×3 convolutions. On the way down a max pooling halves the maps and the next stage doubles the
    channels; on the way up a transposed convolution undoes both, and the maps of the same stage on the way down are
    joined in front. A 1×1 convolution gives the logits, (N, num_classes, H, W). The paper has `norm="none"` and
    `padded=False`: 572 pixels a side make 388. A norm follows each 3×3 convolution and takes the place of its bias.

    Padded, any size from 2^depth on is possible: maps of odd size lose a row going down, and get it back as zeros.

    Args:
        norm: See `create`.
        num_classes: Channels of the output.
        in_channels: Channels of the input (N, in_channels, H, W).
        image_size: Side of the input, to be checked; the network is the same for all.
        depth: Poolings; the paper's is 4.
        width: Channels of the first stage.
        padded: Whether convolutions keep the size of the maps. Otherwise each takes 2 pixels off, and what comes from
            the way down is cropped to its centre.
        dropout: Behind the deepest stage; the paper has some, and says not how much.
        activation: Its name, or a function that makes it.
        placement: The norm goes `"before"` or `"after"` the activation.
        init: Of all layers: `"kaiming"` (the paper's, section 3, up to the choice of the fan), `"xavier"`, `"lecun"`,
            `"torch"`, `"small-gaussian"`, or the standard deviation of a Gaussian.

    Raises:
        UserError: an unknown name, a depth or width below 1, images that are too small, or a dropout outside [0, 1].
    """

    def __init__(
        self,
        *,
        norm: Norm,
        num_classes: int,
        in_channels: int,
        image_size: int = 572,
        depth: int = 4,
        width: int = 64,
        padded: bool = True,
        dropout: float = 0.0,
        activation: Activation = "relu",
        placement: str = "before",
        init: Init = "kaiming",
    ):
        super().__init__()
        for what, number in (("depth", depth), ("width", width)):
            require(
                isinstance(number, int) and number > 0, f"{what} must be a positive integer, got {number!r}: try 4."
            )
        require(0 <= dropout <= 1, f"dropout must be between 0 and 1, got {dropout}: try 0.5.")
        self.padded = padded
        self.smallest = 2**depth if padded else _smallest_without_padding(depth)
        check_image_size(image_size, self.smallest, f"a unet of depth {depth}")
        style = ConvStyle(norm, activation, init, placement)
        widths = [width * 2**stage for stage in range(depth + 1)]
        self.down = nn.ModuleList(
            _stage(*io, style, padded) for io in zip([in_channels, *widths[:-2]], widths[:-1], strict=True)
        )
        self.pool = nn.MaxPool2d(2)
        self.bottom = nn.Sequential(*_stage(widths[-2], widths[-1], style, padded), nn.Dropout(dropout))
        upward = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.upsample = nn.ModuleList(conv_transpose2d(*io, 2, stride=2, bias=True, init=init) for io in upward)
        self.up = nn.ModuleList(_stage(*io, style, padded) for io in upward)
        self.classifier = conv2d(width, num_classes, 1, bias=True, init="torch" if init == "kaiming" else init)

    def forward(self, x: Tensor) -> Tensor:
        check_images(x, self.smallest, "unet")
        passed: list[Tensor] = []
        for stage in self.down:
            passed.append(stage(x))
            x = self.pool(passed[-1])
        x = self.bottom(x)
        for upsample, stage in zip(self.upsample, self.up, strict=True):
            x = stage(_joined(passed.pop(), upsample(x), self.padded))
        return self.classifier(x)


def _stage(in_channels: int, out_channels: int, style: ConvStyle, padded: bool) -> nn.Sequential:
    padding = 1 if padded else 0
    return nn.Sequential(
        ConvNorm(in_channels, out_channels, 3, style, padding=padding),
        ConvNorm(out_channels, out_channels, 3, style, padding=padding),
    )


def _joined(passed: Tensor, x: Tensor, padded: bool) -> Tensor:
    """`passed` in front of x: without padding the centre of it, of x's size; with it, x gets the rows it lost."""
    high, wide = passed.shape[-2] - x.shape[-2], passed.shape[-1] - x.shape[-1]
    if padded:
        return torch.cat([passed, F.pad(x, (0, wide, 0, high))], 1)
    top, left = high // 2, wide // 2
    return torch.cat([F.pad(passed, (-left, left - wide, -top, top - high)), x], 1)


def _smallest_without_padding(depth: int) -> int:
    """The side of the input that leaves one pixel in the output."""
    side = 1
    for _ in range(depth):
        side = (side + 4 + 1) // 2  # through two convolutions and an upsampling
    for _ in range(depth):
        side = 2 * (side + 4)
    return side + 4


register("unet", UNet)
