"""Exchange the batch norms of a model for another kind of norm."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from .. import nn as layers
from .._checks import UserError, require, unknown
from ..graph import Forward
from ._graft import FROZEN, OURS, activation_of, dimensions_of, grafted, origin_of, settings_of
from ._norms import is_batch_norm, is_known
from ._operation import Operation
from ._result import Surgery
from ._verify import check, relative_error, run_in_eval, tolerance_for
from ._where import Where, names_of
from ._where import selected as meant

_BY_DIMENSION: dict[str, dict[int, type[_BatchNorm]]] = {
    "batch": {1: layers.BatchNorm1d, 2: layers.BatchNorm2d, 3: layers.BatchNorm3d},
    "frozen": {1: layers.FrozenBatchNorm1d, 2: layers.FrozenBatchNorm2d, 3: layers.FrozenBatchNorm3d},
    "torch": {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d},
}
_OF_ANY_DIMENSION: dict[str, type[_BatchNorm]] = {
    "frozen": layers.FrozenBatchNorm,
    "ghost": layers.GhostBatchNorm,
    "renorm": layers.BatchRenorm,
    "sync": layers.SyncBatchNorm,
}
_OTHER_STATISTICS = (layers.DomainBatchNorm, layers.RecurrentBatchNorm)
_WITHOUT_STATISTICS = ("group", "layer", "instance")
KINDS = tuple(sorted({*_BY_DIMENSION, *_OF_ANY_DIMENSION, *_WITHOUT_STATISTICS}))


class Impossible(Exception):
    """Why a layer is left as it is."""


@torch.inference_mode(False)
def convert(
    model: nn.Module,
    to: str | type[_BatchNorm],
    where: Where | None = None,
    *,
    inplace: bool = False,
    example: Any = None,
    forward: Forward | None = None,
    tolerance: float | None = None,
    **options: Any,
) -> Surgery:
    """Make another kind of norm of a model's batch norms.

    To `"batch"` (`bnkit.nn.BatchNorm1d`, `2d`, `3d`), `"sync"`, `"ghost"`, `"frozen"`, `"renorm"` and `"torch"` (plain
    torch.nn) the layer keeps its parameters and buffers, as the same tensors under the same `state_dict` keys,
    momentum, eps, `requires_grad`, hooks and mode. A layer used in several places stays one layer. In eval mode the
    outputs are those from before, to the bit where the same kernels run, and the way back restores the class and all
    that it had. timm's layers with an activation, and torchvision's `FrozenBatchNorm2d`, whose weight and bias become
    parameters that need no gradient, convert too.

    To `"group"` (`nn.GroupNorm`), `"layer"` (`nn.GroupNorm` of one group) and `"instance"` weight and bias stay, and
    running statistics go: outputs change, and there is no way back.

    Left alone, with the reason in `.skipped`: layers that are of the kind already, subclasses with a forward of their
    own, layers whose activation the new kind can't apply, and ones without what the new kind needs.

    Args:
        model: untouched, unless `inplace`. It may be a single batch norm.
        to: one of the kinds above, or a class such as `torch.nn.SyncBatchNorm`.
        where: which layers: names, shell patterns, types, or a predicate on name and module. Default: all.
        inplace: change `model` itself, and nothing if anything fails.
        example: an input to verify on; for the kinds that keep statistics the outputs in eval mode must agree.
        forward: `forward(model, example)`, how to call the model.
        tolerance: how far outputs may differ, relative to the largest; default 1e-4 for float32.
        options: arguments of the new layers, such as `ghost_size=16`, `process_group=`, or `groups=` of "group" (32;
            where the channels are no multiple of it, the largest common divisor).
            `dims=` 1, 2 or 3 says what the model's layers are where their class does not tell.

    Raises:
        UserError: an unknown kind or option, or outputs that differ.
    """
    dims = options.pop("dims", None)
    if isinstance(to, str) and to not in KINDS:
        raise unknown("kind of norm", to, KINDS)
    require(
        isinstance(to, str) or not issubclass(to, _OTHER_STATISTICS),
        f"convert keeps a layer's statistics as they are, got {to}, which holds them in another form: build it, "
        "and load the state_dict.",
    )
    groups = options.get("groups", 32)
    require(isinstance(groups, int) and groups >= 1, f"groups must be at least 1, got {groups!r}: 32 is usual.")
    require(dims in (None, 1, 2, 3), f"dims must be 1, 2 or 3, got {dims}: 2 is for images.")
    _check_options(to, options)
    before = None if example is None else run_in_eval(model, example, forward)
    changed, skipped = {}, {}
    with Operation(model, inplace=inplace) as operation:
        replace = replacement(to, options, operation.model, dims)
        for name, layer in selected(operation.model, where):
            try:
                new = replace(layer)
            except Impossible as reason:
                skipped[name] = str(reason)
                continue
            operation.swap(layer, new)
            changed[name] = f"{type(layer).__name__} → {type(new).__name__}"
        error = None
        if example is not None:
            error = _verified(operation.model, before, example, forward, tolerance, to in _WITHOUT_STATISTICS)
    return operation.result(changed, skipped, error)


def selected(model: nn.Module, where: Where | None) -> list[tuple[str, nn.Module]]:
    """The batch norms of a model that `where` means, each once, by their first name."""
    return [(name, module) for module, name in meant(where, names_of(model), is_batch_norm).items()]


def replacement(
    to: str | type[_BatchNorm], options: dict[str, Any], model: nn.Module, dims: int | None
) -> Callable[[nn.Module], nn.Module]:
    """What makes the new layer out of an old one, and raises `Impossible` where it can't."""
    usual = dims or _usual_dimensions(model)

    def replace(layer: nn.Module) -> nn.Module:
        if not is_known(layer):
            raise Impossible(f"{type(layer).__name__} has a forward of its own")
        if "parametrizations" in layer._modules:
            raise Impossible("is parametrized")
        if to in _WITHOUT_STATISTICS:
            return _without_statistics(layer, str(to), options, dimensions_of(layer) or usual)
        kind = to if isinstance(to, type) else _class_of(to, dimensions_of(layer), usual)
        _check_possible(layer, kind, options)
        return grafted(layer, kind, options, model)

    return replace


def _class_of(to: str, own: int | None, usual: int | None) -> type[_BatchNorm]:
    if to == "frozen" and own is None:
        return layers.FrozenBatchNorm
    if to in _OF_ANY_DIMENSION and to not in _BY_DIMENSION:
        return _OF_ANY_DIMENSION[to]
    dims = own or usual
    if dims is None:
        raise Impossible("nothing tells whether it is of 1, 2 or 3 dimensions: pass dims=")
    return _BY_DIMENSION[to][dims]


def _usual_dimensions(model: nn.Module) -> int | None:
    """That of all convolutions of the model; 1 if there are none; None if they differ."""
    found = {len(module.kernel_size) for module in model.modules() if isinstance(module, _ConvNd)} or {1}
    return found.pop() if len(found) == 1 else None


def _check_possible(layer: nn.Module, kind: type[_BatchNorm], options: dict[str, Any]) -> None:
    if type(layer) is kind and not options:
        raise Impossible(f"is a {kind.__name__} already")
    if layer.running_mean is None and issubclass(kind, (layers.BatchRenorm, *FROZEN)):
        raise Impossible(f"keeps no running statistics, which {kind.__name__} needs")
    try:
        activation = activation_of(layer)
    except LookupError as error:
        raise Impossible(f"applies a {error} too, which bnkit.nn's layers don't") from None
    _check_activation(layer, activation, kind)


def _check_activation(layer: nn.Module, activation: str | None, kind: type[nn.Module]) -> None:
    origin = origin_of(layer)
    returns = origin is not None and origin.kind is kind
    if activation is not None and not issubclass(kind, OURS) and not returns:
        raise Impossible(f"applies {activation}, which {kind.__name__} can't")


def _without_statistics(layer: nn.Module, to: str, options: dict[str, Any], dims: int | None) -> nn.Module:
    try:
        activation = activation_of(layer)
    except LookupError as error:
        raise Impossible(f"applies a {error} too") from None
    settings = settings_of(layer)
    channels, eps = settings["num_features"], settings["eps"]
    if to == "instance":
        if dims is None:
            raise Impossible("nothing tells whether it is of 1, 2 or 3 dimensions: pass dims=")
        new: nn.Module = getattr(nn, f"InstanceNorm{dims}d")(channels, eps, affine=True, device="meta")
    else:
        groups = math.gcd(options.get("groups", 32), channels) if to == "group" else 1
        new = nn.GroupNorm(groups, channels, eps, device="meta")
    _check_activation(layer, activation, type(new))
    for name in ("weight", "bias"):
        tensor = getattr(layer, name)
        parameter = tensor if tensor is None or isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, False)
        new.register_parameter(name, parameter)
    for name in vars(new):
        if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called", "_is_full_backward_hook")):
            vars(new)[name] = vars(layer)[name]
    new.training = layer.training
    return new


def _check_options(to: str | type, options: dict[str, Any]) -> None:
    if to in _WITHOUT_STATISTICS:
        allowed = {"groups"} if to == "group" else set()
    else:
        kind = to if isinstance(to, type) else _OF_ANY_DIMENSION.get(to, layers.BatchNorm2d)
        own = inspect.signature(kind).parameters
        fixed = {"num_features", "eps", "momentum", "affine", "track_running_stats", "device", "dtype", "bias"}
        more = inspect.signature(OURS).parameters if issubclass(kind, OURS) else ()
        allowed = set() if to == "torch" else {*own, *more} - fixed - {"options", "trainable", "inplace"}
    for option in options:
        if option not in allowed:
            choices = ", ".join(sorted(allowed | {"dims"}))
            raise UserError(f"convert to {to!r} has no option {option!r}: it has {choices}.")


def _verified(
    model: nn.Module, before: Any, example: Any, forward: Forward | None, tolerance: float | None, differs: bool
) -> float:
    error = relative_error(run_in_eval(model, example, forward), before)
    if not differs:
        check(error, tolerance_for(before, tolerance), "convert")
    return error
