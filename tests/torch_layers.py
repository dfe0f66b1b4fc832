"""Layers of torch.nn as the newest PyTorch makes them, on any that bnkit supports."""

from __future__ import annotations

from torch import nn


def without_bias(norm: nn.Module) -> nn.Module:
    """A batch norm as `bias=False` makes it, which is no option in PyTorch 2.11."""
    norm.register_parameter("bias", None)
    return norm
