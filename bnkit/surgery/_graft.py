"""Make a norm of another class out of a layer: its tensors, hooks and settings move over, as the same objects."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import nn as layers
from .._checks import UserError
from ..ops import INVERTIBLE

OURS = layers.BatchNorm2d.__bases__[0]
"""What all batch norms of this package are."""

CARRIED = ("_affine_before", "_adds")
"""Attributes that stay with a layer whatever its class: what `freeze` remembers, and that `fuse` has it add."""

_SETTINGS = ("num_features", "eps", "momentum", "affine", "track_running_stats")
_OPTIONS = ("skip_nonfinite", "process_group", "timeout")


@dataclasses.dataclass
class Origin:
    """What a layer was before: its class, all attributes that are not tensors, hooks or modules, and two modes."""

    kind: type[nn.Module]
    attributes: dict[str, Any]
    training: bool
    model_training: bool

    def __deepcopy__(self, memo: dict[int, Any]) -> Origin:
        """A copy with the same process group: that can't be copied, and is not meant to be."""
        group = self.attributes.get("process_group")
        memo[id(group)] = group
        return Origin(self.kind, copy.deepcopy(self.attributes, memo), self.training, self.model_training)


def origin_of(layer: nn.Module) -> Origin | None:
    """What `grafted` made the layer from; None if it was built as it is."""
    return vars(layer).get("_origin")


def dimensions_of(layer: nn.Module) -> int | None:
    """1, 2 or 3 where the class, or one that the layer was before, says so."""
    origin = origin_of(layer)
    return _dimensions_of_class(type(layer)) or _dimensions_of_origin(origin)


def _dimensions_of_origin(origin: Origin | None) -> int | None:
    if origin is None:
        return None
    return _dimensions_of_class(origin.kind) or _dimensions_of_origin(origin.attributes.get("_origin"))


def _dimensions_of_class(kind: type[nn.Module]) -> int | None:
    names = [base.__name__ for base in kind.__mro__]
    if "SyncBatchNormAct" in names:  # timm's, which is of images
        return 2
    return next((int(name[-2]) for name in names if name[-2:] in ("1d", "2d", "3d")), None)


def activation_of(layer: nn.Module) -> str | None:
    """The activation that the layer applies, by its name in `bnkit.nn`.

    Raises:
        LookupError: that has none, or there is a dropout too.
    """
    return vars(layer)["activation"] if isinstance(layer, OURS) else _activation_of_children(layer)


def _activation_of_children(layer: nn.Module) -> str | None:
    """That of timm's layers, which stay a layer's children whatever its class."""
    parts = [child for name, child in layer.named_children() if name in ("drop", "act")]
    parts = [part for part in parts if type(part) is not nn.Identity]
    for part in parts:
        if layers.activation_name(part) is None:
            raise LookupError(type(part).__name__)
    return layers.activation_name(parts[0]) if parts else None


def loses(layer: nn.Module, kind: type[nn.Module], activates_behind: bool) -> str | None:
    """What the layer does besides normalizing that a `kind` made of it would not, in words; None if nothing.

    Args:
        layer: a batch norm.
        kind: what shall be made of it.
        activates_behind: whether there is a place behind the layer for its activation.

    Raises:
        LookupError: see `activation_of`.
    """
    activation = activation_of(layer)
    if issubclass(kind, OURS):
        return None
    if "_adds" in vars(layer):
        return "adds a residual"
    if is_again(layer, kind) and activation == _activation_of_children(layer):
        return None
    return None if activation is None or activates_behind else f"applies {activation}"


def is_again(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether the layer was made of a `kind`, as which it comes back with all that it had."""
    origin = origin_of(layer)
    return origin is not None and origin.kind is kind


def grafted(layer: nn.Module, kind: type[_BatchNorm], options: dict[str, Any], model: nn.Module) -> _BatchNorm:
    """A `kind` that has the layer's parameters, buffers, hooks and settings; the layer itself is not changed.

    If the layer was made from a `kind`, it is that again, with all that only this class has, such as a ghost size.

    Args:
        layer: a batch norm, torchvision's frozen one included.
        kind: the class to make.
        options: arguments of `kind` beyond those of every batch norm.
        model: that the layer is in.
    """
    origin = origin_of(layer)
    returns = is_again(layer, kind) and not options
    new = _blank(layer, kind, origin.attributes if returns and origin is not None else None, options)
    _move_state(layer, new)
    vars(new).update({name: vars(layer)[name] for name in CARRIED if name in vars(layer)})
    if not returns:
        vars(new)["_origin"] = Origin(type(layer), _own_attributes(layer), layer.training, model.training)
    if isinstance(new, layers.FrozenBatchNorm):
        new.training = False
    elif isinstance(layer, layers.FrozenBatchNorm) or not isinstance(layer, _BatchNorm):
        new.training = _mode_now(layer, model)
    else:
        new.training = layer.training
    return new


def _mode_now(layer: nn.Module, model: nn.Module) -> bool:
    """The mode that a frozen layer would have, were it not: as before, or as the model's mode has changed since."""
    origin = origin_of(layer)
    if origin is None:
        return model.training
    if layer is model or model.training == origin.model_training:
        return origin.training
    return model.training


def _blank(
    layer: nn.Module, kind: type[_BatchNorm], attributes: dict[str, Any] | None, options: dict[str, Any]
) -> _BatchNorm:
    """A `kind` with the layer's settings and no tensors yet."""
    settings = settings_of(layer)
    if attributes is not None:
        new = kind.__new__(kind)
        nn.Module.__init__(new)
        vars(new).update(attributes | settings)
    else:
        new = _constructed(kind, settings, options)
        vars(new).update(settings)
    for name in _OPTIONS:
        if hasattr(layer, name) and hasattr(new, name) and name not in options:
            setattr(new, name, getattr(layer, name))
    if issubclass(kind, OURS) and "activation" not in options:
        vars(new)["activation"] = activation_of(layer)
    _carry_inplace(layer, new)
    return new


def _constructed(kind: type[_BatchNorm], settings: dict[str, Any], options: dict[str, Any]) -> _BatchNorm:
    try:
        return kind(settings["num_features"], momentum=settings["momentum"], device="meta", **options)
    except UserError:
        raise
    except (TypeError, ValueError, AttributeError) as error:
        if not options:  # then it is no mistake of the caller's
            raise
        given = ", ".join(f"{name}={value!r}" for name, value in options.items())
        raise UserError(
            f"{kind.__name__} must be made with options that it takes, got {given} ({error}): give other values."
        ) from error


def _carry_inplace(layer: nn.Module, new: nn.Module) -> None:
    """`inplace` stays with a layer of a kind that can be so, as far as the activation can be undone."""
    if not (isinstance(layer, OURS) and isinstance(new, OURS) and layer.can_be_inplace and new.can_be_inplace):
        return
    vars(new)["inplace"] = layer.inplace and new.activation in INVERTIBLE


def settings_of(layer: nn.Module) -> dict[str, Any]:
    """The attributes that every batch norm has."""
    found = {name: vars(layer)[name] for name in _SETTINGS if name in vars(layer)}
    mean = layer.running_mean
    channels = mean.numel() if isinstance(mean, Tensor) else found.get("num_features")
    defaults = {"num_features": channels, "eps": 1e-5, "momentum": 0.1, "affine": True, "track_running_stats": True}
    return defaults | found


def _own_attributes(layer: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(layer).items() if name not in {*_MODULE_STATE, *CARRIED}}


_MODULE_STATE = frozenset(vars(nn.Module()))


def _move_state(layer: nn.Module, new: nn.Module) -> None:
    """Parameters, buffers, children and hooks. The dicts of hooks are shared, so that handles still remove them."""
    tensors = {name: vars(layer)[name].copy() for name in ("_parameters", "_buffers", "_modules")}
    for name in _MODULE_STATE - {"training"}:
        vars(new)[name] = tensors.get(name, vars(layer).get(name))
    vars(new)["_non_persistent_buffers_set"] = set(layer._non_persistent_buffers_set)
    _complete(new)


def _complete(new: nn.Module) -> None:
    """What torchvision's frozen layer holds otherwise, as torch.nn's batch norms do."""
    for name in ("weight", "bias"):
        if name in new._buffers:
            tensor = new._buffers.pop(name)
            new._parameters[name] = None if tensor is None else nn.Parameter(tensor, requires_grad=False)
        new._parameters.setdefault(name, None)
    for name in ("running_mean", "running_var"):
        new._buffers.setdefault(name, None)
    mean = new._buffers["running_mean"]
    if "num_batches_tracked" not in new._buffers:
        count = None if mean is None else torch.zeros((), dtype=torch.long, device=mean.device)
        new._buffers["num_batches_tracked"] = count
