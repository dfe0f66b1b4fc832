"""Norms that keep no running statistics, made of batch norms: group, layer and instance normalization."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

from torch import nn

from .._modes import evaluating
from ..graph import Forward, record
from . import _activating
from ._activating import Activating
from ._graft import OURS, activation_of, dimensions_of, settings_of


class Impossible(Exception):
    """Why a layer is left as it is."""


def positions_seen(model: nn.Module, example: Any, forward: Forward | None) -> dict[nn.Module, set[int]]:
    """How many dimensions lie behind the channels in what each module is called with on the example."""
    with evaluating(model):
        facts = record(model, example, forward)
    seen: dict[nn.Module, set[int]] = defaultdict(set)
    for call in facts.calls:
        seen[call.module] |= {len(value.shape) - 2 for value in call.inputs[:1]}
    return seen


def places(layer: nn.Module, seen: set[int], dims: int | None, usual: int | None) -> int:
    """1, 2 or 3: how many dimensions of its input an instance is normalized over."""
    told = dimensions_of(layer) or usual
    if not seen and told is not None and (told > 1 or dims == 1):
        seen = {told}
    if not seen:
        raise Impossible("nothing tells whether its input is (N, C), of one value a channel: pass example= or dims=")
    if 0 in seen:
        raise Impossible("its input is (N, C), where an instance has one value a channel")
    if len(seen) > 1 or not seen <= {1, 2, 3}:
        raise Impossible("its inputs are not of 1, 2 or 3 dimensions behind the channels, and always as many")
    return min(seen)


def without_statistics(layer: nn.Module, to: str, options: dict[str, Any], places: int, alone: bool) -> nn.Module:
    """The norm `to` in the layer's place, of `places` dimensions if it is "instance".

    It activates and takes a residual as the layer does, unless it shall normalize `alone`.
    """
    try:
        activation = activation_of(layer)
    except LookupError as error:
        raise Impossible(f"applies a {error} too") from None
    settings = settings_of(layer)
    channels, eps = settings["num_features"], settings["eps"]
    classes: Any = _activating if not alone and (activation is not None or isinstance(layer, OURS)) else nn
    if to == "instance":
        new: nn.Module = getattr(classes, f"InstanceNorm{places}d")(channels, eps, affine=True, device="meta")
    else:
        groups = math.gcd(options.get("groups", 32), channels) if to == "group" else 1
        new = classes.GroupNorm(groups, channels, eps, device="meta")
    if isinstance(new, Activating):
        new.activation = activation
    for name in ("weight", "bias"):
        tensor = getattr(layer, name)
        parameter = tensor if tensor is None or isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, False)
        new.register_parameter(name, parameter)
    for name in vars(new):
        if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called", "_is_full_backward_hook")):
            vars(new)[name] = vars(layer)[name]
    new.training = layer.training
    return new
