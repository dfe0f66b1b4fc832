"""Activations by the names that `bnkit.nn.BatchNorm` fuses."""

from __future__ import annotations

from torch import nn

from .._checks import unknown

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "hardswish": nn.Hardswish,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
}


def activation_layer(name: str) -> nn.Module:
    """The activation called `name`, out of place.

    Raises:
        UserError: an unknown name.
    """
    if name not in _ACTIVATIONS:
        raise unknown("activation", name, _ACTIVATIONS)
    return _ACTIVATIONS[name]()
