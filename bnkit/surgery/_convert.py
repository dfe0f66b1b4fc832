"""Exchange the batch norms of a model for another kind of norm."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from .. import nn as layers
from .._checks import FailedCheck, UserError, require, unknown
from ..graph import Forward
from ._graft import OURS, activation_of, dimensions_of, grafted, is_again, loses
from ._norms import is_batch_norm, is_batch_norm_class, is_known
from ._operation import Operation
from ._result import Surgery
from ._stateless import Impossible, places, positions_seen, without_statistics
from ._verify import check, relative_error, run_changed, run_in_eval, tolerance_for
from ._verify_training import check_training, trained
from ._weighted import has_hooks
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
_PLAIN = {*_BY_DIMENSION["batch"].values(), *_BY_DIMENSION["torch"].values()}
_OTHER_STATISTICS = (layers.DomainBatchNorm, layers.RecurrentBatchNorm)
_WITHOUT_STATISTICS = ("group", "layer", "instance")
KINDS = tuple(sorted({*_BY_DIMENSION, *_OF_ANY_DIMENSION, *_WITHOUT_STATISTICS}))


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
    running statistics go: outputs change, and there is no way back. To `"instance"` a `BatchNorm1d` goes only if its
    input is known to be (N, C, L), by `example` or `dims=1`: of (N, C) an instance has one value a channel.

    Where a layer of bnkit's applies its activation and the new one can't, the activation gets its module back behind it
    in bnkit's models, and where `fuse` put it into the layer and `bnkit.nn.Fused` in its place. Of other such layers,
    and of ones that take a residual, `"group"`, `"layer"` and `"instance"` make subclasses that do the same.

    Left alone, with the reason in `.skipped`: layers that are of the kind already, subclasses with a forward of their
    own, layers that activate or add where the new kind can't, and ones without what the new kind needs.

    Args:
        model: untouched, unless `inplace`. It may be a single batch norm.
        to: one of the kinds above, or a class such as `torch.nn.SyncBatchNorm`.
        where: which layers: names, shell patterns, types, or a predicate on name and module. Default: all.
        inplace: change `model` itself, and nothing if anything fails.
        example: an input to verify on: no old layer may run any more, and for the kinds that keep statistics the
            outputs in eval mode must agree. So must outputs, gradients and statistics of a step of training where
            all layers were and become `torch.nn`'s or `bnkit.nn`'s `BatchNorm1d`, `2d` or `3d`, if the model can train
            on it.
        forward: `forward(model, example)`, how to call the model.
        tolerance: how far outputs may differ, relative to the largest; default 1e-4 for float32.
        options: arguments of the new layers, such as `ghost_size=16`, `process_group=`, or `groups=` of "group" (32;
            where the channels are no multiple of it, the largest common divisor).
            `dims=` 1, 2 or 3 says what the model's layers are where their class does not tell.

    Raises:
        UserError: an unknown kind or option, outputs that differ, or an old layer that still runs on the example.
    """
    dims = options.pop("dims", None)
    _check_kind(to)
    groups = options.get("groups", 32)
    require(isinstance(groups, int) and groups >= 1, f"groups must be at least 1, got {groups!r}: 32 is usual.")
    require(dims in (None, 1, 2, 3), f"dims must be 1, 2 or 3, got {dims}: 2 is for images.")
    _check_options(to, options)
    before = None if example is None else run_in_eval(model, example, forward)
    plain = to in ("batch", "torch", *_PLAIN) and any(type(module) in _PLAIN for module in model.modules())
    trains = trained(model, example, forward) if plain and example is not None else None
    originals = {} if inplace else dict(model.named_modules())  # a closure in a copy still holds them
    with Operation(model, inplace=inplace) as operation:
        seen = positions_seen(operation.model, example, forward) if to == "instance" and example is not None else {}
        behind = _placeholders(operation.model)
        replace = replacement(to, options, operation.model, dims, seen, behind)
        exchanged, changed, skipped = _exchange(operation, replace, where, behind)
        error = None
        if example is not None:
            old = exchanged | {originals[name]: name for name in changed if name in originals}
            with _refused(old):
                error = _verified(operation.model, before, example, forward, tolerance, to in _WITHOUT_STATISTICS)
                if all(type(layer) in _PLAIN for layer in exchanged):
                    check_training(operation.model, example, forward, trains, "convert")
    return operation.result(changed, skipped, error)


def _check_kind(to: Any) -> None:
    if isinstance(to, str):
        if to not in KINDS:
            raise unknown("kind of norm", to, KINDS)
        return
    name = getattr(to, "__name__", "")
    known = (kind for kind in _WITHOUT_STATISTICS if name.lower().startswith(f"{kind}norm"))
    hint = next((f'say to="{kind}"' for kind in known), 'to="batch" is usual')
    require(
        isinstance(to, type) and is_batch_norm_class(to),
        f"to must be one of {', '.join(KINDS)}, or a class of batch norms, got {to!r}: {hint}.",
    )
    require(
        not issubclass(to, _OTHER_STATISTICS),
        f"convert keeps a layer's statistics as they are, got {to}, which holds them in another form: build it, "
        "and load the state_dict.",
    )


def _placeholders(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """What stands behind layers in the place of their activation, by layer."""
    return {module.norm: module for module in model.modules() if type(module) is layers.Fused and not has_hooks(module)}


def _exchange(
    operation: Operation,
    replace: Callable[[nn.Module], nn.Module],
    where: Where | None,
    behind: Mapping[nn.Module, nn.Module],
) -> tuple[dict[nn.Module, str], dict[str, str], dict[str, str]]:
    """The old layers with their names, what changed, and what did not."""
    old, changed, skipped = {}, {}, {}
    for name, layer in selected(operation.model, where):
        try:
            new = replace(layer)
        except Impossible as reason:
            skipped[name] = str(reason)
            continue
        operation.swap(layer, new)
        old[layer], changed[name] = name, f"{type(layer).__name__} → {type(new).__name__}"
        if layer in behind and not isinstance(new, OURS):
            kind = layers.ACTIVATION_MODULES.get(activation_of(layer) or "", nn.Identity)
            activation = kind().train(behind[layer].training)
            operation.swap(behind[layer], activation)
            changed[name] += f", {type(activation).__name__} behind it"
    return old, changed, skipped


def selected(model: nn.Module, where: Where | None) -> list[tuple[str, nn.Module]]:
    """The batch norms of a model that `where` means, each once, by their first name."""
    return [(name, module) for module, name in meant(where, names_of(model), is_batch_norm).items()]


def replacement(
    to: str | type[_BatchNorm],
    options: dict[str, Any],
    model: nn.Module,
    dims: int | None,
    seen: Mapping[nn.Module, set[int]] | None = None,
    behind: Mapping[nn.Module, nn.Module] | None = None,
) -> Callable[[nn.Module], nn.Module]:
    """What makes the new layer out of an old one, and raises `Impossible` where it can't.

    `seen` is how many dimensions of positions the layers' inputs have, where that is known, and `behind` what stands
    in the place of the activations that layers have taken up.
    """
    usual, seen, behind = dims or _usual_dimensions(model), seen or {}, behind or {}

    def replace(layer: nn.Module) -> nn.Module:
        if not is_known(layer):
            raise Impossible(f"{type(layer).__name__} has a forward of its own")
        if "parametrizations" in layer._modules:
            raise Impossible("is parametrized")
        if to in _WITHOUT_STATISTICS:
            over = places(layer, seen.get(layer, set()), dims, usual) if to == "instance" else 0
            return without_statistics(layer, str(to), options, over, alone=layer in behind)
        kind = to if isinstance(to, type) else _class_of(to, dimensions_of(layer), usual)
        _check_possible(layer, kind, options, layer in behind)
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


def _check_possible(layer: nn.Module, kind: type[_BatchNorm], options: dict[str, Any], activates_behind: bool) -> None:
    if type(layer) is kind and not options:
        raise Impossible(f"is a {kind.__name__} already")
    if layer.running_mean is None and issubclass(kind, (layers.BatchRenorm, layers.FrozenBatchNorm)):
        raise Impossible(f"keeps no running statistics, which {kind.__name__} needs")
    if not is_again(layer, kind) and not _is_built_as_usual(kind, options):
        raise Impossible(f"{kind.__name__} takes other arguments than num_features, momentum= and device=")
    try:
        lost = loses(layer, kind, activates_behind)
    except LookupError as error:
        raise Impossible(f"applies a {error} too, which bnkit.nn's layers don't") from None
    if lost is not None:
        raise Impossible(f"{lost}, which {kind.__name__} can't")


def _is_built_as_usual(kind: type[nn.Module], options: dict[str, Any]) -> bool:
    try:
        inspect.signature(kind).bind(1, momentum=0.1, device="meta", **options)
    except TypeError:
        return False
    return True


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
    error = relative_error(run_changed(model, example, forward, "convert"), before)
    if not differs:
        check(error, tolerance_for(before, tolerance), "convert")
    return error


@contextlib.contextmanager
def _refused(old: Mapping[nn.Module, str]) -> Iterator[None]:
    """Refuse that layers run which were exchanged: what holds them has not been seen."""

    def refuse(name: str, *_: Any, **__: Any) -> None:
        raise FailedCheck(
            f"an exchanged layer must not run any more, but {name} does on the example: a closure, bound method or "
            "other object holds it too; nothing was changed. Hold it in an attribute, list or dict of a module."
        )

    for layer, name in old.items():
        vars(layer)["forward"] = functools.partial(refuse, name)
    try:
        yield
    finally:
        for layer in old:
            del vars(layer)["forward"]
