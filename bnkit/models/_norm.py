"""Normalization and an activation, by name: what `norm=` means in every model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from .. import nn as layers
from .. import ops
from .._checks import UserError, require, unknown
from ._activation import Activation, activation_layer

Norm = str | Callable[[int], nn.Module]

_PLACEMENTS = ("before", "after")


def norm_layers(
    norm: Norm, num_features: int, *, dims: int = 2, activation: Activation = "relu", placement: str = "before"
) -> list[nn.Module]:
    """The layers that normalize `num_features` channels and apply `activation`, in the order they run.

    Two layers whatever the kind, so that a model's `state_dict` keys don't depend on it, and the activation alone
    for `"none"`. See `norm_and_activation`.

    Args:
        placement: `"before"` the activation, as published, or `"after"` it.

    Raises:
        UserError: what `norm_and_activation` raises it for, and an unknown `placement`.
    """
    check_placement(placement)
    if norm == "none":
        return [activation_layer(activation)]
    if placement == "after":
        return [activation_layer(activation), norm_layer(norm, num_features, dims=dims)]
    return [*norm_and_activation(norm, num_features, dims=dims, activation=activation)]


def norm_and_activation(
    norm: Norm, num_features: int, *, dims: int = 2, activation: Activation = "relu"
) -> tuple[nn.Module, nn.Module]:
    """The norm and the activation that follows it.

    A layer of `bnkit.nn` adds the residual and applies the activation itself, and `bnkit.nn.Fused` stands in the
    activation's place. `norm_add` calls the pair.

    Args:
        norm: See `norm_layer`.
        num_features: Channels.
        dims: 1 for vectors (N, C), 2 for images (N, C, H, W).
        activation: Its name, or a function that makes it.

    Raises:
        UserError: an unknown `norm` or `activation`; `"instance"` for vectors; a function that gives no module.
    """
    separate = activation_layer(activation)
    layer = norm_layer(norm, num_features, dims=dims)
    if isinstance(activation, str) and _fuses(layer) and activation in ops.ACTIVATIONS:
        setattr(layer, "activation", activation)  # noqa: B010
        return layer, layers.Fused(layer)
    return layer, separate


def _fuses(layer: nn.Module) -> bool:
    """Whether it is of bnkit.nn, with no activation yet."""
    return isinstance(layer, nn.modules.batchnorm._BatchNorm) and getattr(layer, "activation", "") is None


def norm_add(norm: nn.Module, activation: nn.Module, x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
    """activation(norm(x) + residual), for a pair that `norm_and_activation` made."""
    if isinstance(activation, layers.Fused):
        return norm(x, residual=residual)  # by name, so that hooks of the positional arguments leave it alone
    y = norm(x)
    return activation(y if residual is None else y + residual)


def norm_layer(norm: Norm, num_features: int, *, dims: int = 2) -> nn.Module:
    """The layer that normalizes `num_features` channels, without an activation.

    Args:
        norm: One of `norms()`, or a function from the number of channels to a module.

            - `"none"`: the identity.
            - `"batch"`: `bnkit.nn.BatchNorm1d` or `BatchNorm2d` (Ioffe and Szegedy 2015).
            - `"sync"`, `"ghost"`, `"frozen"`, `"renorm"`: its relatives of the same names in `bnkit.nn`.
            - `"group"`: `nn.GroupNorm` (Wu and He 2018): 32 groups, or fewer where a group would get under
              two channels (of images) or 16 features (of vectors).
            - `"layer"`: all channels and positions of one sample together (Ba et al. 2016).
            - `"instance"`: each channel of one sample by itself, with scale and shift (Ulyanov et al. 2016).
        num_features: Channels.
        dims: 1 for vectors (N, C), 2 for images (N, C, H, W).

    Raises:
        UserError: an unknown name; `"instance"` for vectors; a function that gives no module.
    """
    if callable(norm):
        layer = norm(num_features)
        require(
            isinstance(layer, nn.Module),
            f"norm must give a torch.nn.Module, got {type(layer).__name__}: pass a function like torch.nn.BatchNorm2d.",
        )
        return layer
    if norm not in _NORMS:
        raise unknown("norm", norm, _NORMS)
    return _NORMS[norm](num_features, dims)


def norms() -> list[str]:
    """The names that `norm=` takes."""
    return list(_NORMS)


def check_placement(placement: str) -> None:
    """Raise unless the norm goes `"before"` or `"after"` the activation."""
    if placement not in _PLACEMENTS:
        raise unknown("placement", placement, _PLACEMENTS)


def has_bias(norm: Norm, placement: str = "before") -> bool:
    """Whether a convolution needs its own bias: not where a norm follows at once, whose β takes its place."""
    return norm == "none" or placement == "after"


def _batch_relative(name: str) -> Callable[[int, int], nn.Module]:
    """The class `name` of bnkit.nn, in its form for the number of dimensions if it has one."""

    def make(num_features: int, dims: int) -> nn.Module:
        kind = getattr(layers, f"{name}{dims}d", None) or getattr(layers, name)
        return kind(num_features)

    return make


def _group(num_features: int, dims: int) -> nn.Module:
    # A group of one value would be normalized to zero: features of a vector need company.
    smallest = 16 if dims == 1 else 2
    groups = max(g for g in range(1, 33) if num_features % g == 0 and (g == 1 or num_features // g >= smallest))
    return nn.GroupNorm(groups, num_features)


def _instance(num_features: int, dims: int) -> nn.Module:
    if dims == 1:
        raise UserError(
            "norm 'instance' needs images, got vectors (one value a channel has no variance): use layer or group."
        )
    return nn.InstanceNorm2d(num_features, affine=True)


_NORMS: dict[str, Callable[[int, int], nn.Module]] = {
    "none": lambda num_features, dims: nn.Identity(),
    "batch": _batch_relative("BatchNorm"),
    "sync": _batch_relative("SyncBatchNorm"),
    "ghost": _batch_relative("GhostBatchNorm"),
    "frozen": _batch_relative("FrozenBatchNorm"),
    "renorm": _batch_relative("BatchRenorm"),
    "group": _group,
    "layer": lambda num_features, dims: nn.GroupNorm(1, num_features),
    "instance": _instance,
}
