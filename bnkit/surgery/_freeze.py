"""Keep batch norms' statistics and affine parameters as they are through `model.train()`, and let go of them again."""

from __future__ import annotations

import functools

import torch
from torch import nn

from .._checks import require
from ..nn import FrozenBatchNorm
from ._convert import replacement, selected
from ._graft import grafted, loses, origin_of
from ._operation import Operation, check_unwrapped
from ._result import Surgery
from ._stateless import Impossible
from ._where import Where

_HERE = "_frozen_by_freeze"


@torch.inference_mode(False)
def freeze(
    model: nn.Module, statistics: bool = True, affine: bool = True, where: Where | None = None, *, inplace: bool = False
) -> Surgery:
    """Freeze the batch norms of a model: through `model.train()`, and until `unfreeze`.

    With `statistics` a layer becomes a `FrozenBatchNorm`, which normalizes with its running statistics in training too,
    and never updates them; one that is frozen already stays as it is, torchvision's too. With `affine` its weight and
    bias need no gradient. Parameters, buffers, hooks and `state_dict` keys stay as they are, and the model pickles. An
    optimizer of the model given works on: with `inplace=True` as it is, else through `.rebind(optimizer)`.

    Args:
        model: untouched, unless `inplace`. It may be a single batch norm.
        statistics: freeze running statistics, and normalize with them.
        affine: freeze weight and bias.
        where: which layers, as in `convert`. Default: all.
        inplace: change `model` itself.

    Raises:
        UserError: neither statistics nor affine; or affine inside DistributedDataParallel, which waits for a gradient
            of each parameter that needed one at first.
    """
    require(
        statistics or affine, "freeze needs something to freeze, got statistics=False, affine=False: leave one True."
    )
    if affine:
        check_unwrapped(model)
    changed, skipped = {}, {}
    with Operation(model, inplace=inplace) as operation:
        replace = replacement("frozen", {}, operation.model, None)
        for name, layer in selected(operation.model, where):
            done = []
            if statistics and not _is_frozen(layer):
                try:
                    new = replace(layer)
                except Impossible as reason:
                    skipped[name] = str(reason)
                    continue
                vars(new)[_HERE] = True
                operation.swap(layer, new)
                layer, done = new, ["statistics"]
            if affine and _hold_affine(operation, layer):
                done.append("affine")
            (changed if done else skipped)[name] = f"froze {' and '.join(done)}" if done else "is frozen already"
    return operation.result(changed, skipped, None)


@torch.inference_mode(False)
def unfreeze(
    model: nn.Module, statistics: bool = True, affine: bool = True, where: Where | None = None, *, inplace: bool = False
) -> Surgery:
    """Undo `freeze`: each layer is again of the class it was, with its own momentum, mode and `requires_grad`.

    A layer follows the model's mode if that has changed in between. One that `fuse` has put an activation into since
    becomes a `BatchNorm1d`, `2d` or `3d`, which applies it.

    Layers frozen otherwise stay so, unless `freeze` has frozen none of those that `where` means: then each becomes what
    it was converted from, or a `BatchNorm1d`, `2d` or `3d`, and weight and bias of one that was built frozen need
    gradients.

    Args:
        model: untouched, unless `inplace`.
        statistics: let go of running statistics.
        affine: let go of weight and bias.
        where: which layers, as in `convert`. Default: all.
        inplace: change `model` itself.

    Raises:
        UserError: affine inside DistributedDataParallel, as in `freeze`.
    """
    if affine:
        check_unwrapped(model)
    changed, skipped = {}, {}
    with Operation(model, inplace=inplace) as operation:
        chosen = selected(operation.model, where)
        undoes = any(_remembers(layer) for _, layer in chosen)
        for name, layer in chosen:
            if undoes and _is_frozen(layer) and not _remembers(layer):
                skipped[name] = "was frozen before freeze: unfreeze once more"
                continue
            done, built_frozen = [], _is_frozen(layer) and origin_of(layer) is None
            if statistics and _is_frozen(layer) and (_HERE in vars(layer) or not undoes):
                try:
                    new = _thawed(layer, operation.model)
                except Impossible as reason:
                    skipped[name] = str(reason)
                    continue
                operation.swap(layer, new)
                layer, done = new, ["statistics"]
            if affine and _release_affine(operation, layer, built_frozen):
                done.append("affine")
            (changed if done else skipped)[name] = f"released {' and '.join(done)}" if done else "is not frozen"
    return operation.result(changed, skipped, None)


def _remembers(layer: nn.Module) -> bool:
    """Whether `freeze` has done something to it that has not been undone."""
    return _HERE in vars(layer) or "_affine_before" in vars(layer)


def _is_frozen(layer: nn.Module) -> bool:
    return isinstance(layer, FrozenBatchNorm) or type(layer).__name__.startswith("FrozenBatchNorm")


def _thawed(layer: nn.Module, model: nn.Module) -> nn.Module:
    origin = origin_of(layer)
    is_frozen_kind = origin is not None and origin.kind.__name__.startswith("FrozenBatchNorm")
    if origin is None or is_frozen_kind or loses(layer, origin.kind, activates_behind=False):
        new = replacement("batch", {}, model, None)(layer)
        vars(new).pop("_origin", None)
        return new
    return grafted(layer, origin.kind, {}, model)  # pyright: ignore[reportArgumentType]


def _hold_affine(operation: Operation, layer: nn.Module) -> bool:
    """Stop the gradients of weight and bias, and remember how they were; whether there was anything to do."""
    before = {name: parameter.requires_grad for name, parameter in _affine(layer).items()}
    if "_affine_before" in vars(layer) or not any(before.values()):
        return False
    operation.touch(layer)
    vars(layer)["_affine_before"] = before
    _require_gradients(operation, layer, dict.fromkeys(before, False))
    return True


def _release_affine(operation: Operation, layer: nn.Module, built_frozen: bool) -> bool:
    before = vars(layer).get("_affine_before")
    if before is None and built_frozen:
        before = {name: True for name, parameter in _affine(layer).items() if not parameter.requires_grad}
    if not before:
        return False
    operation.touch(layer)
    vars(layer).pop("_affine_before", None)
    _require_gradients(operation, layer, before)
    return True


def _affine(layer: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name in ("weight", "bias") if (p := layer._parameters.get(name)) is not None}


def _require_gradients(operation: Operation, layer: nn.Module, needed: dict[str, bool]) -> None:
    for name, parameter in _affine(layer).items():
        operation._undo.append(functools.partial(setattr, parameter, "requires_grad", parameter.requires_grad))
        parameter.requires_grad_(needed.get(name, parameter.requires_grad))
