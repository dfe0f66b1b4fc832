"""LeNet-5, as it is read today and as published."""

from __future__ import annotations

import torch
from torch import nn

from .._checks import require, unknown
from ._activation import Activation, activation_layer
from ._init import Init, conv2d, linear
from ._lenet_parts import CONNECTIONS, RBFOutput, ScaledTanh, Subsampling, TableConv2d, class_codes
from ._norm import Norm, has_bias, norm_layers
from ._registry import register
from ._size import check_side

_POOLS = {"max": nn.MaxPool2d, "average": nn.AvgPool2d}


class LeNet5(nn.Module):
    """Two convolutions and three linear layers (LeCun et al. 1998, section II-B), as it is read today.

    ReLU and max pooling stand for the scaled tanh and the trainable subsampling of the original, C3 sees all maps of
    S2, and a linear layer stands for the radial-basis output; `LeNet1998` is the original. A norm goes before each
    activation and takes the place of the bias.

    Args:
        norm: See `create`; `"instance"` is not possible here, for the linear layers.
        num_classes: Length of the output.
        in_channels: Channels of the input (N, in_channels, image_size, image_size).
        activation: `"relu"`, `"tanh"`, `"sigmoid"`, `"leaky_relu"`, `"silu"`, `"gelu"` or `"hardswish"`.
        pool: `"max"` or `"average"`.
        init: `"kaiming"`, `"lecun"`, `"xavier"`, `"small-gaussian"`, or the standard deviation of a Gaussian.
        image_size: 32, as in the paper, or 28, padded to it by the first convolution.

    Raises:
        UserError: an unknown name, or another image size.
    """

    def __init__(
        self,
        *,
        norm: Norm,
        num_classes: int,
        in_channels: int,
        activation: str = "relu",
        pool: str = "max",
        init: Init = "kaiming",
        image_size: int = 28,
    ):
        super().__init__()
        _check_image_size(image_size, "lenet5")
        self.image_size = image_size
        if pool not in _POOLS:
            raise unknown("pool", pool, _POOLS)
        bias = norm == "none"
        self.features = nn.Sequential(
            conv2d(in_channels, 6, 5, padding=(32 - image_size) // 2, bias=bias, init=init),
            *norm_layers(norm, 6, dims=2, activation=activation),
            _POOLS[pool](2),
            conv2d(6, 16, 5, padding=0, bias=bias, init=init),
            *norm_layers(norm, 16, dims=2, activation=activation),
            _POOLS[pool](2),
        )
        self.classifier = nn.Sequential(
            linear(16 * 5 * 5, 120, bias=bias, init=init),
            *norm_layers(norm, 120, dims=1, activation=activation),
            linear(120, 84, bias=bias, init=init),
            *norm_layers(norm, 84, dims=1, activation=activation),
            linear(84, num_classes, bias=True, init=init),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        check_side(x, self.image_size, "lenet5")
        return self.classifier(torch.flatten(self.features(x), 1))


class LeNet1998(nn.Module):
    """LeNet-5 as published (LeCun et al. 1998, section II-B and figure 2), with 60,000 trainable parameters.

    - S2 and S4 average 2×2 pixels, and scale and shift each map by a coefficient and a bias that are trained.
    - C3 connects each map to some of those of S2 (table I).
    - The squashing function is A tanh(S a), A = 1.7159 and S = 2/3 (equation 6).
    - The output measures the squared distance of the 84 units of F6 to a code of each class, y_i = Σ_j (x_j - w_ij)²
      (equation 7). The ten codes of digits are pictures of 7×12 pixels in ±1; other numbers of classes get random ±1,
      which the paper considers too. Codes are fixed.

    The network gives -y, so that as usual the largest value marks the class, and its softmax is the posterior.
    `rbf_loss` holds the paper's criteria. A norm goes ahead of each squashing and takes the place of the bias; the
    subsampling layers have none, for they have a bias of their own.

    Args:
        norm: See `create`; `"instance"` is not possible here, for the linear layers.
        num_classes: Length of the output.
        in_channels: Channels of the input (N, in_channels, image_size, image_size).
        activation: Its name, or a function that makes it.
        output: `"rbf"`, or `"linear"` for a trained linear layer.
        init: `"lecun"` (appendix A), `"kaiming"`, `"xavier"`, `"torch"`, `"small-gaussian"`, or the standard deviation
            of a Gaussian.
        image_size: 32, as in the paper, or 28, padded to it by the first convolution.

    Raises:
        UserError: an unknown name, or another image size.
    """

    def __init__(
        self,
        *,
        norm: Norm,
        num_classes: int,
        in_channels: int,
        activation: Activation = ScaledTanh,
        output: str = "rbf",
        init: Init = "lecun",
        image_size: int = 32,
    ):
        super().__init__()
        _check_image_size(image_size, "lenet5_1998")
        self.image_size = image_size
        if output not in ("rbf", "linear"):
            raise unknown("output", output, ("rbf", "linear"))
        bias = has_bias(norm)
        self.features = nn.Sequential(
            conv2d(in_channels, 6, 5, padding=(32 - image_size) // 2, bias=bias, init=init),
            *norm_layers(norm, 6, activation=activation),
            Subsampling(6),
            activation_layer(activation),
            TableConv2d(CONNECTIONS, 6, 5, bias=bias, init=init),
            *norm_layers(norm, 16, activation=activation),
            Subsampling(16),
            activation_layer(activation),
            nn.Flatten(),
            linear(16 * 5 * 5, 120, bias=bias, init=init),  # C5, whose 5×5 maps leave one pixel
            *norm_layers(norm, 120, dims=1, activation=activation),
            linear(120, 84, bias=bias, init=init),
            *norm_layers(norm, 84, dims=1, activation=activation),
        )
        if output == "rbf":
            self.classifier: nn.Module = RBFOutput(class_codes(num_classes))
        else:
            self.classifier = linear(84, num_classes, bias=True, init=init)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        check_side(x, self.image_size, "lenet5_1998")
        return self.classifier(self.features(x))


def rbf_loss(negative_distances: torch.Tensor, target: torch.Tensor, j: float | None = None) -> torch.Tensor:
    r"""The criterion of LeNet-5, mean over the batch of the distance y of each sample from the code of its class.

        E = y_target                                                  (equation 8, like a mean squared error)
        E = y_target + log(e^{-j} + Σ_i e^{-y_i})                     (equation 9, with `j`)

    The second also pushes the other classes away, which equation 8 cannot where the codes are trained too: they would
    collapse. j > 0 keeps it from pushing those that are already far; with j → ∞ it is the cross-entropy.

    Args:
        negative_distances: What `LeNet1998` gives, -y, of shape (N, classes).
        target: Classes, (N,).
        j: None for equation 8.
    """
    y = -negative_distances.gather(1, target.unsqueeze(1)).squeeze(1)
    if j is None:
        return y.mean()
    rubbish = negative_distances.new_full((len(target), 1), -j)
    return (y + torch.cat([rubbish, negative_distances], 1).logsumexp(1)).mean()


def _check_image_size(image_size: int, model: str) -> None:
    require(
        image_size in (28, 32),
        f"{model} takes images of 28 or 32 pixels a side, got image_size={image_size}: "
        "resize them or choose another model.",
    )


register("lenet5", LeNet5)
register("lenet5_1998", LeNet1998)
