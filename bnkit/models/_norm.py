"""Normalization followed by an activation, by name: what `norm=` means in every model."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from .._checks import UserError, require, unknown
from ..nn import BatchNorm1d, BatchNorm2d
from ._activation import activation_layer

Norm = str | Callable[[int], nn.Module]


def norm_layers(norm: Norm, num_features: int, *, dims: int, activation: str) -> list[nn.Module]:
    """The layers that normalize `num_features` channels and then apply `activation`, in the order they run.

    Two layers, normalization and activation, whatever the kind, so that a model's `state_dict` keys don't depend on
    it. Batch normalization applies the activation itself, and `nn.Identity` stands in its place. `"none"` gives the
    activation alone.

    Args:
        norm: One of `norms()`, or a function from the number of channels to a module.

            - `"batch"`: `bnkit.nn.BatchNorm1d` or `BatchNorm2d` (Ioffe and Szegedy 2015).
            - `"group"`: `nn.GroupNorm` (Wu and He 2018): 32 groups, or fewer where a group would get under
              two channels (of images) or 16 features (of vectors).
            - `"layer"`: all channels and positions of one sample together (Ba et al. 2016).
            - `"instance"`: each channel of one sample by itself, with scale and shift (Ulyanov et al. 2016).
        num_features: Channels.
        dims: 1 for vectors (N, C), 2 for images (N, C, H, W).
        activation: Its name.

    Raises:
        UserError: an unknown `norm` or `activation`; `"instance"` for vectors; a function that gives no module.
    """
    if callable(norm):
        layer = norm(num_features)
        require(
            isinstance(layer, nn.Module),
            f"norm must give a torch.nn.Module, got {type(layer).__name__}: pass a function like torch.nn.BatchNorm2d.",
        )
        return [layer, activation_layer(activation)]
    if norm not in _NORMS:
        raise unknown("norm", str(norm), _NORMS)
    return _NORMS[norm](num_features, dims, activation)


def norms() -> list[str]:
    """The names that `norm=` takes."""
    return list(_NORMS)


def _none(num_features: int, dims: int, activation: str) -> list[nn.Module]:
    return [activation_layer(activation)]


def _batch(num_features: int, dims: int, activation: str) -> list[nn.Module]:
    activation_layer(activation)
    layer = {1: BatchNorm1d, 2: BatchNorm2d}[dims]
    return [layer(num_features, activation=activation), nn.Identity()]


def _group(num_features: int, dims: int, activation: str) -> list[nn.Module]:
    # A group of one value would be normalized to zero: features of a vector need company.
    smallest = 16 if dims == 1 else 2
    groups = max(g for g in range(1, 33) if num_features % g == 0 and (g == 1 or num_features // g >= smallest))
    return [nn.GroupNorm(groups, num_features), activation_layer(activation)]


def _layer(num_features: int, dims: int, activation: str) -> list[nn.Module]:
    return [nn.GroupNorm(1, num_features), activation_layer(activation)]


def _instance(num_features: int, dims: int, activation: str) -> list[nn.Module]:
    if dims == 1:
        raise UserError(
            "norm 'instance' needs images, got vectors (one value a channel has no variance): use layer or group."
        )
    return [nn.InstanceNorm2d(num_features, affine=True), activation_layer(activation)]


_NORMS: dict[str, Callable[[int, int, str], list[nn.Module]]] = {
    "none": _none,
    "batch": _batch,
    "group": _group,
    "layer": _layer,
    "instance": _instance,
}
