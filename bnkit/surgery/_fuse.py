"""Fuse: batch normalization, the addition and the activation behind it, as one layer."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import nn as bnkit_nn
from .._modes import evaluating, training_flags_kept
from ..graph import Forward, Record, record
from ._fuse_block import rewritten
from ._fuse_follow import Following, activation_of_module, following
from ._graft import CARRIED
from ._norms import is_known, is_ours, is_timms
from ._operation import Operation, check_unwrapped
from ._result import Surgery
from ._verify import check, check_has_values, relative_error, run_changed, run_in_eval, tolerance_for
from ._verify_training import check_training, trained
from ._weighted import Refused, has_hooks
from ._where import Where, selected


@torch.inference_mode(False)
def fuse(
    model: nn.Module,
    example: Any,
    *,
    where: Where | None = None,
    tolerance: float | None = None,
    inplace: bool = False,
    forward: Forward | None = None,
) -> Surgery:
    """Replace batch norm, the addition of a residual and the activation behind it by one layer that does all three.

        y = activation(bn(x) + residual)

    The model runs once on `example`. Each batch norm of torch.nn or timm becomes the layer of `bnkit.nn` with the same
    parameters, buffers and keys. An activation module that runs once, right behind it, goes into it, and
    `bnkit.nn.Fused`, an identity, takes its place. An addition or a functional or shared activation goes into it by
    rewriting the forward of the module in which they stand, with torch.fx: that module becomes one of a subclass, with
    the same attributes, methods, children and keys. What can't be rewritten stays, and `changed` says why.

    Outputs, gradients and running statistics stay the same, in training and in eval mode. Both are compared; where the
    model can't train on the example, a warning says so.

    Args:
        model: Any network.
        example: An input with more than one value a channel: a tensor, a tuple of positional arguments, a dict of
            keyword arguments, or a batch.
        where: Which batch norms: names, shell patterns, types, or a predicate `(name, module) -> bool`; all if None.
        tolerance: Largest relative difference of outputs; see `fold`.
        inplace: Change `model` itself instead of a copy.
        forward: `forward(model, example)` runs the model in another way.

    Returns:
        The fused model in `.model`, in the mode of the one given; what each batch norm took up in `.changed`.

    Raises:
        UserError: outputs, gradients or running statistics differ by more than the tolerance, or a model that can't be
            copied. Then nothing was changed.
    """
    check_unwrapped(model)
    check_has_values(model)
    with Operation(model, inplace=inplace) as operation:
        facts = _record_both(operation.model, example, forward)
        names = selected(where, facts.names, lambda module: isinstance(module, _BatchNorm))
        expected = run_in_eval(operation.model, example, forward)
        expected_in_training = trained(operation.model, example, forward)
        changed, skipped = _fuse_all(operation, facts, names)
        error = relative_error(run_changed(operation.model, example, forward, "fuse"), expected)
        check(error, tolerance_for(expected, tolerance), "fuse")
        check_training(operation.model, example, forward, expected_in_training)
        if expected_in_training is None:
            warnings.warn(
                "fuse compared outputs in eval mode alone: a copy of the model does not run in training mode, in "
                "float64, on the example. Give one that it trains on, with more than one value a channel, and with "
                "targets for a detector.",
                stacklevel=3,
            )
        return operation.result(changed, skipped, error)


def _record_both(model: nn.Module, example: Any, forward: Forward | None) -> Record:
    """What happens in training mode, where a dropout does something; in eval mode, if it can't run in the other."""
    try:
        with training_flags_kept(model):
            return record(model.train(), example, forward)
    except Exception:  # a detector wants targets, a batch norm more values
        with evaluating(model):
            return record(model, example, forward)


def _fuse_all(
    operation: Operation, facts: Record, names: dict[nn.Module, str]
) -> tuple[dict[str, str], dict[str, str]]:
    changed, skipped = {}, {}
    plans: dict[nn.Module, Following] = {}
    for module, name in names.items():
        try:
            plans[module] = _plan(module, facts)
        except Refused as refusal:
            skipped[name] = str(refusal)
    _one_norm_an_addition(plans, facts)
    blocks: dict[nn.Module, dict[nn.Module, Following]] = {}
    for module, follows in plans.items():
        calls = facts.calls_of(module)
        if follows.added is None and (follows.activated is None or _stands_alone(follows, facts)):
            changed[names[module]] = _swap(operation, module, follows)
        elif calls[0].parent is not None:
            blocks.setdefault(calls[0].parent.module, {})[module] = follows
    for block, wanted in blocks.items():
        changed |= {names[module]: text for module, text in _rewrite(operation, block, wanted).items()}
    return {name: changed[name] for name in names.values() if name in changed}, skipped


def _plan(module: nn.Module, facts: Record) -> Following:
    calls = facts.calls_of(module)
    if not calls:
        raise Refused("it did not run on the example")
    if has_hooks(module):
        raise Refused("it has hooks, which would be lost")
    if not is_known(module):
        raise Refused(f"{type(module).__name__} has a forward of its own")
    if is_timms(module):
        return _plan_of_timms(module)
    if isinstance(module, nn.SyncBatchNorm) and not hasattr(bnkit_nn, "SyncBatchNorm"):
        raise Refused("there is no fused SyncBatchNorm")
    if getattr(module, "activation", None) is not None or len(calls[0].inputs) > 1:
        raise Refused("it adds or activates already")
    if getattr(module, "inplace", False):
        raise Refused("inplace=True keeps its output alone, which few activations allow")
    return following(calls[0], facts) if len(calls) == 1 else Following()


def _plan_of_timms(module: Any) -> Following:
    drop, act = getattr(module, "drop", None), getattr(module, "act", None)
    if not isinstance(drop, (nn.Identity, type(None))):
        raise Refused("it drops values")
    if isinstance(act, (nn.Identity, type(None))):
        return Following()
    activation = activation_of_module(act)
    if activation is None or has_hooks(act):
        raise Refused(f"its activation is {type(act).__name__}")
    return Following(activation)


def _one_norm_an_addition(plans: dict[nn.Module, Following], facts: Record) -> None:
    """Of two batch norms that are added to each other only the one that runs last can do it."""
    order = {call.module: index for index, call in enumerate(facts.calls)}
    last: dict[Any, nn.Module] = {}
    for module in sorted(plans, key=lambda module: order[module]):
        if (added := plans[module].added) is not None:
            if added in last:
                plans[last[added]] = Following()
            last[added] = module


def _stands_alone(follows: Following, facts: Record) -> bool:
    """Whether what activates is a module that does nothing else, and runs once."""
    assert follows.activated is not None
    call = follows.activated.call
    if call is None or activation_of_module(call.module) is None or len(facts.calls_of(call.module)) > 1:
        return False
    return not has_hooks(call.module) and call.outputs == follows.activated.outputs


def _rewrite(operation: Operation, block: nn.Module, wanted: dict[nn.Module, Following]) -> dict[nn.Module, str]:
    """Rewrite a block for as many of its batch norms as possible."""
    kind, refused = rewritten(block, wanted)
    operation.touch(block)
    block.__class__ = kind
    texts: dict[nn.Module, str] = {}
    for module, follows in wanted.items():
        if module in refused:
            texts[module] = f"{_swap(operation, module, Following())}; {_words(follows)} stays: {refused[module]}"
        else:
            texts[module] = _swap(operation, module, follows, rewritten=True)
    return texts


def _swap(operation: Operation, module: Any, follows: Following, rewritten: bool = False) -> str:
    """Put the fused layer in a batch norm's place and, unless the forward around it is rewritten, a placeholder in its
    activation's.
    """
    layer = module
    if is_ours(module):
        operation.touch(module)
        module.activation = follows.activation
    else:
        layer = _fused(module, follows.activation)
        operation.swap(module, layer)
    if follows.added is not None:
        vars(layer)["_adds"] = True
    if follows.activated is not None and follows.activated.call is not None and not rewritten:
        activation = follows.activated.call.module
        operation.swap(activation, bnkit_nn.Fused(layer).train(activation.training))
    return f"{type(layer).__name__}{_with(follows)}"


def _fused(module: Any, activation: str | None) -> nn.Module:
    kinds = ("SyncBatchNorm", "BatchNorm1d", "BatchNorm2d", "BatchNorm3d")
    name = next(kind for kind in kinds if isinstance(module, getattr(nn, kind)))
    options = {"process_group": module.process_group} if name == "SyncBatchNorm" else {}
    layer = getattr(bnkit_nn, name)(
        module.num_features, module.eps, module.momentum, device="meta", activation=activation, **options
    )
    layer.affine, layer.track_running_stats = module.affine, module.track_running_stats
    for registry in ("_parameters", "_buffers", "_non_persistent_buffers_set"):
        setattr(layer, registry, getattr(module, registry).copy())
    vars(layer).update({name: vars(module)[name] for name in (*CARRIED, "_origin") if name in vars(module)})
    layer.training = module.training
    return layer


def _with(follows: Following) -> str:
    words = _words(follows)
    return f" with {words}" if words else ""


def _words(follows: Following) -> str:
    parts = ["add"] * (follows.added is not None) + [follows.activation] * (follows.activation is not None)
    return " and ".join(part for part in parts if part)
