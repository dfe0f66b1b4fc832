"""Batch normalization in eval mode as y = scale · x + shift a channel, whoever's class it is."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import nn as bnkit_nn
from ._remainder import AddAndActivate

_FROZEN_CLASSES = frozenset({"FrozenBatchNorm2d", "FrozenBatchNormAct2d"})
_TIMM_CLASSES = frozenset({"BatchNormAct2d", "SyncBatchNormAct"})
_TORCH_FORWARDS = frozenset({_BatchNorm.forward, nn.SyncBatchNorm.forward})
_OUR_FORWARDS = frozenset({bnkit_nn.BatchNorm2d.forward, bnkit_nn.FrozenBatchNorm2d.forward})


def is_batch_norm(module: nn.Module) -> bool:
    """Whether the module is a batch normalization: torch's, ours, timm's, a subclass, or torchvision's frozen one."""
    return isinstance(module, _BatchNorm) or _is_foreign_frozen(module)


def is_batch_norm_class(kind: type) -> bool:
    """Whether such modules are batch normalizations."""
    return issubclass(kind, _BatchNorm) or kind.__name__ in _FROZEN_CLASSES


def uses_running_statistics(module: nn.Module, training: bool) -> bool:
    """Whether it normalizes by running statistics, with `training` as its flag: it has them, and may use them."""
    has_them = isinstance(getattr(module, "running_mean", None), Tensor)
    return has_them and (not training or _is_foreign_frozen(module))


def is_torchs(module: nn.Module) -> bool:
    """Whether it normalizes as torch.nn's layers do."""
    return type(module).forward in _TORCH_FORWARDS


def is_ours(module: nn.Module) -> bool:
    """Whether it normalizes, adds and activates as bnkit's layers do."""
    return type(module).forward in _OUR_FORWARDS


def is_timms(module: nn.Module) -> bool:
    """Whether it is timm's, with an activation."""
    return type(module).__name__ in _TIMM_CLASSES


def is_known(module: nn.Module) -> bool:
    """Whether its forward is one of which we know what it computes."""
    if "forward" in vars(module):  # put there by others, in place of the class's
        return False
    return is_torchs(module) or is_ours(module) or is_timms(module) or _is_foreign_frozen(module)


def affine_of(module: nn.Module) -> tuple[Tensor, Tensor]:
    """Scale and shift in float64: scale = weight / √(running_var + eps), shift = bias - running_mean · scale."""
    mean, var = (_exact(module, name) for name in ("running_mean", "running_var"))
    weight, bias = _exact(module, "weight"), _exact(module, "bias")
    assert mean is not None
    assert var is not None
    scale = (var + getattr(module, "eps", 1e-5)).rsqrt()
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale
    return scale, shift if bias is None else shift + bias


def remainder_of(module: nn.Module, adds: bool) -> nn.Module:
    """What is left of the module when scale and shift are taken out: its addition and activation, or an identity.

    Args:
        module: a known batch normalization.
        adds: whether it is called with a residual.
    """
    activation = getattr(module, "activation", None)
    if is_ours(module) and (adds or activation is not None):
        return AddAndActivate(activation)
    parts: OrderedDict[str, nn.Module] = OrderedDict(
        (name, child) for name, child in module.named_children() if name in ("drop", "act")
    )
    if all(isinstance(part, nn.Identity) for part in parts.values()):
        return nn.Identity()
    return nn.Sequential(parts)


def _exact(module: nn.Module, name: str) -> Tensor | None:
    tensor = getattr(module, name, None)
    return None if tensor is None else tensor.detach().to(torch.float64)


def _is_foreign_frozen(module: nn.Module) -> bool:
    return type(module).__name__ in _FROZEN_CLASSES and isinstance(getattr(module, "running_var", None), Tensor)
