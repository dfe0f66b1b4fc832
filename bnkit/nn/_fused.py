"""Activations as modules, by the names that the layers apply, and what stands where one has gone into a layer."""

from __future__ import annotations

from torch import nn

ACTIVATION_MODULES: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "hardswish": nn.Hardswish,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
}
"""The module that does, by itself, what a layer with `activation=` that name does."""

_TIMMS = {"GELU": "gelu", "HardSwish": "hardswish", "Sigmoid": "sigmoid", "Swish": "silu", "Tanh": "tanh"}


class Fused(nn.Identity):
    """Stands where an activation was, behind a layer that adds the residual and activates by itself.

    Args:
        norm: that layer. It is held without being registered, so that its parameters are listed once, where it stands.
    """

    norm: nn.Module

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        vars(self)["norm"] = norm


def activation_name(module: nn.Module) -> str | None:
    """What the layers call the activation that a module computes; None if they don't know it."""
    if getattr(module, "negative_slope", 0.01) != 0.01 or getattr(module, "approximate", "none") != "none":
        return None
    if getattr(module, "alpha", 1.0) != 1.0:
        return None
    kind = type(module)
    if kind.__module__ == "timm.layers.activations":
        return _TIMMS.get(kind.__name__)
    return next((name for name, known in ACTIVATION_MODULES.items() if kind is known), None)
