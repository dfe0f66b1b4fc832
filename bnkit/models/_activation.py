"""Activations by the names that `bnkit.nn.BatchNorm` fuses."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from .._checks import UserError, unknown
from ..nn import ACTIVATION_MODULES

Activation = str | Callable[[], nn.Module]


def activation_layer(activation: Activation) -> nn.Module:
    """The activation of that name, out of place, or what a function without arguments gives.

    Raises:
        UserError: an unknown name; a function that gives no module.
    """
    if callable(activation):
        layer = activation()
        if not isinstance(layer, nn.Module):
            raise UserError(
                f"activation must give a torch.nn.Module, got {type(layer).__name__}: pass a class like torch.nn.ELU."
            )
        return layer
    if activation not in ACTIVATION_MODULES:
        raise unknown("activation", activation, ACTIVATION_MODULES)
    return ACTIVATION_MODULES[activation]()
