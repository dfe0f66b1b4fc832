"""Fold: absorb batch normalizations, as they are in eval mode, into neighbouring convolutions and linear layers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .._checks import UserError, require
from .._modes import evaluating
from ..graph import Call, Forward, Record, record
from ._fold_plan import Planner, affine_of_call
from ._layout import restored_format
from ._norms import affine_of, is_batch_norm, is_known, remainder_of, uses_running_statistics
from ._operation import Operation, check_unwrapped, copied
from ._remainder import AddAndActivate, ChannelAffine
from ._result import Surgery
from ._verify import check, check_has_values, largest_error, relative_error, run_changed, tolerance_for
from ._weighted import Refused, has_hooks
from ._where import Where, selected

_FUNCTIONS = ("batch_norm", "native_batch_norm", "native_batch_norm_legit_no_training")


@torch.inference_mode(False)
def fold(
    model: nn.Module,
    example: Any,
    *,
    data: Iterable[Any] | Tensor | None = None,
    where: Where | None = None,
    padding: Literal["refuse", "exact"] = "refuse",
    rest: Literal["keep", "affine"] = "keep",
    tolerance: float | None = None,
    inplace: bool = False,
    forward: Forward | None = None,
) -> Surgery:
    """Absorb batch normalizations into the layers before or after them, for inference.

        y = s·(W x + b) + t = (s W) x + (s b + t),   s = γ/√(running_var + ε),   t = β - running_mean·s
        y = W(s x + t) + b  = (W s) x + (b + W t)

    The model runs once on `example`, which tells what feeds what. Each batch norm goes into what made its input: a
    convolution of any dimension, transposed or grouped, a linear layer, another batch norm, each part of a
    concatenation or sum; or else into all convolutions and linear layers that read its output. In its place stands
    an `nn.Identity`, or what else it did: its activation, its addition of a residual, a copy where it made a
    transposed input dense. Other keys of the `state_dict` stay; layers without a bias get one. The arithmetic is done
    in float64 and stored in the weight's type. What is refused is tried again once others are gone, on a record of
    what came out, until nothing changes.

    What is folded is the model in eval mode, whatever mode it is in, and the result is in eval mode. Left alone, with
    the reason in `skipped`: a batch norm or layer that runs more than once, whose weight is shared, computed
    (weight norm) or watched by hooks; an input that something else reads too, or overwrites before the output is
    read; batch statistics; a linear layer whose features lie in another dimension than the batch norm's channels;
    and where zero padding would make it inexact at the border. Only what `example` reaches is seen: of a model with
    control flow, fold what all paths share.

    Args:
        model: Any network.
        example: An input: a tensor, a tuple of positional arguments, a dict of keyword arguments, or a batch.
        data: Batches on which to verify the result as well, as from a `DataLoader`: tensors, (input, label) pairs or
            dicts of arguments; or one tensor.
        where: Which batch norms: names, shell patterns, types, or a predicate `(name, module) -> bool`; all if None.
        padding: Before a convolution that pads with zeros, `"refuse"` to fold, or `"exact"`: pad with the value that
            the batch norm would have made zero, in the batch norm's place.
        rest: What becomes of a batch norm that can't be folded: `"keep"` it, or make it `"affine"`, one
            multiplication and one addition a channel, if it runs several times too. It stays if it did not run,
            has hooks, a forward of its own, shared or otherwise used tensors, or batch statistics, or makes some of
            its inputs dense and others not.
        tolerance: Largest relative difference of outputs; None for 1e-4 in float32, 1e-9 in float64, 1e-2 in float16,
            5e-2 in bfloat16.
        inplace: Change `model` itself instead of a copy.
        forward: `forward(model, example)` runs the model in another way, on each batch of `data` too.

    Returns:
        The folded model in `.model`, what was folded into what in `.changed`.

    Raises:
        UserError: outputs differ by more than the tolerance, an unknown option, or a model that can't be copied. Then
            nothing was changed.
    """
    require(padding in ("refuse", "exact"), f"padding must be 'refuse' or 'exact', got {padding!r}: choose one.")
    require(rest in ("keep", "affine"), f"rest must be 'keep' or 'affine', got {rest!r}: choose one.")
    original = _to_compare(model) if inplace and data is not None else model
    check_unwrapped(model)
    check_has_values(model)
    with Operation(model, inplace=inplace) as operation:
        facts = _recorded(operation, example, forward)
        wanted = selected(where, facts.names, is_batch_norm)
        changed, skipped, last = _fold_all(
            operation, facts, wanted, padding == "exact", lambda: _recorded(operation, example, forward)
        )
        if rest == "affine":
            _make_rest_affine(operation, last, wanted, changed, skipped)
        skipped |= _functional(facts) if where is None else {}
        error = relative_error(run_changed(operation.model, example, forward, "fold"), facts.output)
        if data is not None:
            batches = [data] if isinstance(data, Tensor) else data
            error = max(error, largest_error(operation.model, original, batches, forward))
        check(error, tolerance_for(facts.output, tolerance), "fold")
        operation.model.eval()
        return operation.result(changed, skipped, error)


def _recorded(operation: Operation, example: Any, forward: Forward | None) -> Record:
    with evaluating(operation.model):
        return record(operation.model, example, forward)


def _to_compare(model: nn.Module) -> nn.Module:
    try:
        return copied(model)
    except UserError as error:
        raise UserError(
            f"data= compares the folded model with a copy of it as it was, which can't be made ({error.__cause__}): "
            "leave data out, or remove what hinders, such as weight_norm's old form."
        ) from error


def _functional(facts: Record) -> dict[str, str]:
    """The modules that normalize by a function, and are no batch norm."""
    operators = (op for op in facts.operators if op.name in _FUNCTIONS and op.call is not None)
    found = dict.fromkeys(op.call for op in operators if not any(is_batch_norm(call.module) for call in op.calls()))
    return {
        call.name: "batch_norm runs in its forward, outside of a layer: only layers are folded"
        for call in found
        if call
    }


def _fold_all(
    operation: Operation, facts: Record, wanted: dict[nn.Module, str], pad: bool, record_again: Callable[[], Record]
) -> tuple[dict[str, str], dict[str, str], Record]:
    """Fold what can be, and what was refused once more when others are gone, until nothing changes.

    Returns:
        what was changed, what was skipped, and the record on which that was decided.
    """
    changed: dict[str, str] = {}
    while True:
        newly, skipped = _fold_once(operation, facts, wanted, pad)
        changed |= newly
        wanted = {module: name for module, name in wanted.items() if name in skipped}
        if not newly or not wanted:
            return changed, skipped, facts
        try:
            facts = record_again()
        except Exception:  # it no longer runs, as the comparison of outputs will tell
            return changed, skipped, facts


def _fold_once(
    operation: Operation, facts: Record, wanted: dict[nn.Module, str], pad: bool
) -> tuple[dict[str, str], dict[str, str]]:
    changed, skipped = {}, {}
    eligible: dict[nn.Module, Call] = {}
    for module, name in wanted.items():
        try:
            eligible[module] = _only_call(module, facts)
        except Refused as refusal:
            skipped[name] = str(refusal)
    planner = Planner(facts, eligible, set(), pad)
    order = {call: index for index, call in enumerate(facts.calls)}
    for module, call in sorted(eligible.items(), key=lambda item: order[item[1]]):
        try:
            changed[wanted[module]] = _fold_one(operation, planner, call)
        except Refused as refusal:
            skipped[wanted[module]] = str(refusal)
    return changed, skipped


def _make_rest_affine(
    operation: Operation, facts: Record, wanted: dict[nn.Module, str], changed: dict[str, str], skipped: dict[str, str]
) -> None:
    for module, name in wanted.items():
        if name not in skipped:
            continue
        try:
            calls = _calls(module, facts)
        except Refused:
            continue
        if len({restored_format(call.inputs[0], call.outputs[0]) for call in calls}) > 1:
            continue
        _make_affine(operation, module, calls)
        changed[name] = f"made affine: {skipped.pop(name)}"


def _only_call(module: nn.Module, facts: Record) -> Call:
    """The one run of a batch norm that computes what we think it does.

    Raises:
        Refused: it doesn't.
    """
    calls = _calls(module, facts)
    if len(calls) != 1:
        raise Refused(f"it runs {len(calls)} times")
    if len(calls[0].inputs) > 1 > len(calls[0].arguments[0]):  # which of them is the residual?
        raise Refused("it is called in an unusual way")
    return calls[0]


def _calls(module: nn.Module, facts: Record) -> list[Call]:
    """The runs of a batch norm that in each computes scale · x + shift, and what `remainder_of` tells.

    Raises:
        Refused: it does something else, or something else uses its tensors.
    """
    calls = facts.calls_of(module)
    if not calls:
        raise Refused("it did not run on the example")
    if not all(uses_running_statistics(module, call.training) for call in calls):
        raise Refused("it normalizes by the batch's statistics in eval mode too")
    if not is_known(module):
        raise Refused(f"{type(module).__name__} has a forward of its own")
    if has_hooks(module):
        raise Refused("it has hooks, which would be lost")
    for call in calls:
        if len(call.outputs) != 1 or call.outputs[0] in call.inputs or len(call.inputs[0].shape) < 2:
            raise Refused("it is called in an unusual way")
    _check_own_tensors(module, calls, facts)
    return calls


def _check_own_tensors(module: nn.Module, calls: list[Call], facts: Record) -> None:
    name = facts.names[module][0]
    for key in (*module._parameters, *module._buffers):
        full = f"{name}.{key}" if name else key
        if full in facts.tied:
            raise Refused(f"its {key} shares memory with {facts.tied[full]}")
        readers = facts.held[full].readers if full in facts.held else ()
        if not all(any(call.contains(reader) for call in calls) for reader in readers):
            raise Refused(f"its {key} is used outside of it too")


def _fold_one(operation: Operation, planner: Planner, call: Call) -> str:
    module, affine = call.module, affine_of_call(call)
    remainder = remainder_of(module, adds=len(call.inputs) > 1)
    alone = isinstance(remainder, nn.Identity)
    try:
        steps = planner.into_makers(call.inputs[0], affine, call)
    except Refused as refusal:
        if not alone:
            raise
        try:
            steps = planner.into_readers(call.outputs[0], affine, call)
        except Refused as second:
            raise Refused(f"{refusal}; and {second}") from None
    for step in steps:
        step.apply(operation)
    targets = [step.target for step in steps if step.target != "padding"]
    if len(targets) == len(steps):
        _put(operation, module, _in_its_place(remainder, call))
        if alone:
            planner.folded.add(module)
        return f"folded into {', '.join(targets)}"
    return f"folded into {', '.join(targets)}, which pads here"


def _in_its_place(remainder: nn.Module, call: Call) -> nn.Module:
    """The remainder as something that can be called as the batch norm was, and lays its output out as that did."""
    layout, (args, kwargs) = restored_format(call.inputs[0], call.outputs[0]), call.arguments
    if isinstance(remainder, nn.Identity) and (layout is not None or len(args) + len(kwargs) > 1):
        remainder = AddAndActivate(None)
    if isinstance(remainder, AddAndActivate):
        remainder.layout = layout
    return remainder


def _put(operation: Operation, old: nn.Module, new: nn.Module) -> None:
    new.train(old.training)
    operation.swap(old, new)


def _make_affine(operation: Operation, module: nn.Module, calls: list[Call]) -> None:
    scale, shift = affine_of(module)
    mean: Tensor = module.running_mean  # pyright: ignore[reportAssignmentType]
    affine = ChannelAffine(scale.to(mean.dtype), shift.to(mean.dtype), like=module)
    affine.layout = restored_format(calls[0].inputs[0], calls[0].outputs[0])
    remainder = remainder_of(module, adds=any(len(call.inputs) > 1 for call in calls))
    if isinstance(remainder, AddAndActivate):
        affine.activation = remainder.activation
    elif not isinstance(remainder, nn.Identity):
        _put(operation, module, nn.Sequential(OrderedDict([("affine", affine), *remainder.named_children()])))
        return
    _put(operation, module, affine)
