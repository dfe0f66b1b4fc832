"""Modules that stand where a batch normalization was folded away."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import ACTIVATIONS


def add_and_activate(y: Tensor, residual: Tensor | None, activation: str | None) -> Tensor:
    """activation(y + residual)."""
    y = y if residual is None else y + residual
    return y if activation is None else ACTIVATIONS[activation](y)


class AddAndActivate(nn.Module):
    """activation(x + residual): what `bnkit.nn.BatchNorm2d` does besides normalizing.

    Args:
        activation: A name that `bnkit.nn.BatchNorm2d` takes, or None.

    Attributes:
        layout: The memory format of the result; None leaves it to the input's.
    """

    layout: torch.memory_format | None = None

    def __init__(self, activation: str | None) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """activation(input + residual), of the input's shape."""
        y = add_and_activate(input, residual, self.activation)
        return y if self.layout is None else y.contiguous(memory_format=self.layout)

    def extra_repr(self) -> str:
        """The activation's name."""
        return f"activation={self.activation}"


class ChannelAffine(AddAndActivate):
    """y = activation(weight · x + bias + residual), with a weight and a bias for each channel, dimension 1.

    Args:
        weight, bias: (C,).
        activation: A name that `bnkit.nn.BatchNorm2d` takes, or None.
        like: The batch norm in whose place it stands: weight and bias need gradients as its own do, and none where it
            has no parameters. Without one, both do.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor, activation: str | None = None, like: nn.Module | None = None
    ) -> None:
        super().__init__(activation)
        self.weight = nn.Parameter(weight, like is None or _needs_gradient(like, "weight"))
        self.bias = nn.Parameter(bias, like is None or _needs_gradient(like, "bias"))

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """activation(weight · input + bias + residual), of the shape and type of the input, (N, C, *)."""
        shape = (1, -1) + (1,) * (input.dim() - 2)
        y = input * self.weight.view(shape) + self.bias.view(shape)
        return super().forward(y.to(input.dtype), residual)

    def extra_repr(self) -> str:
        """The number of channels, and the activation."""
        return f"{self.weight.numel()}, {super().extra_repr()}"


class ChannelPad(nn.Module):
    """Pads each channel of (N, C, *) with a value of its own.

    Args:
        value: (C,).
        amounts: of padding, as `torch.nn.functional.pad` takes them.
    """

    value: Tensor

    def __init__(self, value: Tensor, amounts: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("value", value)
        self.amounts = amounts

    def forward(self, input: Tensor, residual: None = None) -> Tensor:
        """The input in the middle, exactly, and `value` around it."""
        shape = (1, -1) + (1,) * (input.dim() - 2)
        outside = 1 - F.pad(input.new_ones((1, 1, *input.shape[2:])), self.amounts)
        return F.pad(input, self.amounts) + outside * self.value.to(input.dtype).view(shape)

    def extra_repr(self) -> str:
        """The number of channels and the amounts."""
        return f"{self.value.numel()}, amounts={self.amounts}"


def _needs_gradient(module: nn.Module, name: str) -> bool:
    tensor = getattr(module, name, None)
    return tensor is not None and tensor.requires_grad
