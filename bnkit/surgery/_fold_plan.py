"""Where the scale and shift of a batch normalization can go, decided on the record; refused where it isn't exact."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..graph import Call, Operator, Record, Value
from ._axis import axis_after, axis_before, spread
from ._norms import affine_of
from ._operation import Operation
from ._remainder import ChannelPad
from ._weighted import Refused, Weighted, is_weighted, own_pad, weighted_by, zero_padding

_CONCATENATIONS = frozenset({"cat", "concat", "concatenate"})
_ADDITIONS = frozenset({"add", "iadd"})


@dataclasses.dataclass(frozen=True)
class Step:
    """One change of a plan: `target` is the name of the module that takes up scale and shift."""

    target: str
    apply: Callable[[Operation], object]


@dataclasses.dataclass(frozen=True)
class Affine:
    """scale · x + shift along one dimension."""

    scale: Tensor
    shift: Tensor
    axis: int = 1

    def split(self, sizes: list[int]) -> list[Affine]:
        """One for each run of channels."""
        parts = zip(self.scale.split(sizes), self.shift.split(sizes), strict=True)
        return [Affine(scale, shift, self.axis) for scale, shift in parts]

    def at(self, axis: int) -> Affine:
        """The same along another dimension."""
        return dataclasses.replace(self, axis=axis)

    def without_shift(self) -> Affine:
        """The scale alone."""
        return dataclasses.replace(self, shift=torch.zeros_like(self.shift))


@dataclasses.dataclass(frozen=True)
class Planner:
    """Finds where a scale and shift can go.

    Attributes:
        record: of the model in eval mode.
        norms: the batch normalizations whose call may take up another's scale and shift, or hand it on.
        folded: those among them that are gone: their output is their input.
        pad: whether a zero padding may be replaced by one with the value that comes out as zero.
    """

    record: Record
    norms: dict[nn.Module, Call]
    folded: set[nn.Module]
    pad: bool

    def into_makers(self, value: Value, affine: Affine, reader: Call | Operator) -> list[Step]:
        """What to change upstream so that `value` becomes affine(value), read by `reader` alone.

        Raises:
            Refused: it can't be exact.
        """
        maker = value.maker
        if maker is None:
            raise Refused("its input is not the result of a layer" if not value.name else f"it reads {value.name}")
        _check_only_reader(value, reader)
        if is_weighted(maker):
            return [self._into_weighted(maker, affine)]
        norm = next((call for call in maker.calls() if self.norms.get(call.module) is call), None)
        if norm is not None and value in norm.outputs:
            return self._into_norm(norm, affine)
        if maker.name in _CONCATENATIONS:
            return self._into_parts(maker, affine)
        if maker.name in _ADDITIONS:
            return self._into_terms(maker, affine)
        axis = axis_before(maker, affine.axis)
        if axis is None:
            raise Refused(f"its input comes from {maker.name}")
        return self.into_makers(maker.inputs[0], affine.at(axis), maker)

    def _into_weighted(self, operator: Operator, affine: Affine) -> Step:
        weighted = weighted_by(operator, self.record)
        _check_axis(weighted, operator.outputs[0], affine, "outputs")
        return Step(weighted.name, lambda operation: weighted.scale_outputs(operation, affine.scale, affine.shift))

    def _into_norm(self, call: Call, affine: Affine) -> list[Step]:
        if affine.axis != 1:
            raise Refused(f"{call.name} normalizes another dimension")
        if call.module in self.folded:
            return self.into_makers(call.inputs[0], affine, call)
        if len(call.inputs) != 1 or getattr(call.module, "activation", None) or list(call.module.children()):
            raise Refused(f"{call.name} before it has an activation")
        return [Step(call.name, lambda operation: _rescale(operation, call.module, affine))]

    def _into_parts(self, operator: Operator, affine: Affine) -> list[Step]:
        parts = operator.argument(0, "tensors")
        dim = operator.argument(1, "dim", operator.argument(1, "axis", 0))
        if dim % len(operator.outputs[0].shape) != affine.axis:
            raise Refused(f"its input is concatenated along dimension {dim}")
        if len({len(part.shape) for part in parts}) > 1:
            raise Refused("its input is concatenated of tensors of several dimensions")
        if len(set(parts)) < len(parts):
            raise Refused("its input is concatenated of one value twice")
        pieces = affine.split([part.shape[affine.axis] for part in parts])
        pairs = zip(parts, pieces, strict=True)
        return _one_each([step for part, piece in pairs for step in self._of_part(part, piece, operator)])

    def _of_part(self, part: Value, affine: Affine, operator: Operator) -> list[Step]:
        try:
            return self.into_makers(part, affine, operator)
        except Refused as refusal:
            raise Refused(f"its input is a {operator.name} of several, one of which can't take it: {refusal}") from None

    def _into_terms(self, operator: Operator, affine: Affine) -> list[Step]:
        terms = operator.inputs
        if len(terms) != 2 or len({(term.shape, term.dtype) for term in terms}) > 1 or len(set(terms)) < 2:
            raise Refused("its input comes from an addition that broadcasts, or adds a constant or a value to itself")
        if operator.argument(2, "alpha", 1) != 1:
            raise Refused("its input comes from an addition with alpha")
        first = self._of_part(terms[0], affine, operator)
        return _one_each(first + self._of_part(terms[1], affine.without_shift(), operator))

    def into_readers(self, value: Value, affine: Affine, maker: Call) -> list[Step]:
        """What to change downstream so that reading x where `value` = affine(x) was read changes nothing.

        Raises:
            Refused: it can't be exact.
        """
        if value.escapes:
            raise Refused("its output is also an output of the model or kept by it")
        readers = [reader for reader in value.readers if not maker.contains(reader)]
        if not readers:
            raise Refused("nothing reads its output")
        steps: list[Step] = []
        for reader in readers:
            steps += self._into_reader(value, affine, reader, alone=len(readers) == 1, maker=maker)
        return _one_each(steps)

    def _into_reader(self, value: Value, affine: Affine, reader: Operator, alone: bool, maker: Call) -> list[Step]:
        self._check_unwritten(value, reader, maker)
        if is_weighted(reader) and reader.argument(0, "input") is value:
            return self._into_reading_weighted(value, affine, reader, alone, maker)
        axis = affine.axis if own_pad(reader) else axis_after(reader, affine.axis)
        if axis is not None:
            return self.into_readers(reader.outputs[0], affine.at(axis), maker)
        copies = spread(reader) if affine.axis == 1 else None
        if copies is None:
            raise Refused(f"its output goes to {reader.name}")
        wide = Affine(affine.scale.repeat_interleave(copies), affine.shift.repeat_interleave(copies))
        return self.into_readers(reader.outputs[0], wide, maker)

    def _check_unwritten(self, value: Value, reader: Operator, maker: Call) -> None:
        """Refuse where the reader would find other values or another shape, were `value` in the memory of the input."""
        source, result = maker.inputs[0], maker.outputs[0]
        if value.memory is not result.memory:  # a copy, which stays one
            return
        if value.memory in reader.writes:
            raise Refused(f"its output is changed in place by {reader.name}")
        if (writer := self.record.overwriting(source, since=result, before=reader)) is not None:
            raise Refused(f"its input is overwritten by {writer.name} before {reader.name} reads its output")

    def _into_reading_weighted(
        self, value: Value, affine: Affine, reader: Operator, alone: bool, maker: Call
    ) -> list[Step]:
        weighted = weighted_by(reader, self.record)
        _check_axis(weighted, value, affine, "inputs")
        take = Step(weighted.name, lambda operation: weighted.scale_inputs(operation, affine.scale, affine.shift))
        if weighted.linear or not affine.shift.any():
            return [take]
        if weighted.transposed:
            raise Refused(f"{weighted.name} is transposed: not every output sums all of its weights")
        if not zero_padding(weighted):
            return [take]
        return [take, self._padded(value, affine, weighted, alone, maker)]

    def _padded(self, value: Value, affine: Affine, weighted: Weighted, alone: bool, maker: Call) -> Step:
        if not self.pad:
            raise Refused(f"{weighted.name} pads with zeros, which the shift would turn into something else")
        if not alone or value not in maker.outputs or type(weighted.module) not in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
            raise Refused(f"{weighted.name} pads with zeros, and its padding can't be moved")
        if bool(((affine.scale == 0) & (affine.shift != 0)).any()):
            raise Refused(f"{weighted.name} pads with zeros, and a channel with scale 0 never is zero")
        zero = torch.where(affine.scale == 0, 0.0, -affine.shift / affine.scale).to(value.dtype)
        return Step(
            "padding", lambda operation: operation.swap(maker.module, ChannelPad(zero, weighted.unpad(operation)))
        )


def _check_only_reader(value: Value, reader: Call | Operator) -> None:
    if isinstance(reader, Call) and reader.inputs.count(value) > 1:
        raise Refused("its input is also its residual")
    if value.returned:
        raise Refused("its input is also an output of the model")
    if value.kept:
        raise Refused("its input is kept by the model after the forward pass")
    inside = reader.contains if isinstance(reader, Call) else lambda operator: operator is reader
    others = [operator for operator in value.readers if not inside(operator)]
    if others:
        where = next((call.name for call in others[0].calls()), "") or "the model"
        raise Refused(f"its input is used elsewhere too: by {others[0].name} in {where}")


def _check_axis(weighted: Weighted, value: Value, affine: Affine, side: str) -> None:
    dims = len(value.shape)
    axis = dims - 1 if weighted.linear else dims - len(weighted.weight.shape) + 1
    if affine.axis % dims != axis or (not weighted.linear and axis != 1):
        raise Refused(
            f"{weighted.name} has its {side} in dimension {axis} of {dims}, the batch norm its channels in "
            f"dimension {affine.axis}"
        )


def _one_each(steps: list[Step]) -> list[Step]:
    """Refuse a plan that changes one module twice: each step counts on finding it unchanged."""
    targets = [step.target for step in steps]
    if len(set(targets)) < len(targets):
        raise Refused("it would have to go into one layer twice")
    return steps


def _rescale(operation: Operation, norm: nn.Module, affine: Affine) -> None:
    """Make a batch normalization compute scale · y + shift instead of y, by its weight and bias."""
    scale, shift = affine_of(norm)
    mean: Tensor = norm.running_mean  # pyright: ignore[reportAssignmentType]
    var: Tensor = norm.running_var  # pyright: ignore[reportAssignmentType]
    weight = scale * affine.scale * (var.double() + getattr(norm, "eps", 1e-5)).sqrt()
    bias = (shift + mean.double() * scale) * affine.scale + affine.shift
    for name, value in (("weight", weight), ("bias", bias)):
        tensor = getattr(norm, name)
        if tensor is not None:
            operation.fill(tensor, value)
            continue
        operation.touch(norm)
        norm.register_parameter(name, nn.Parameter(value.to(mean.dtype)))
        norm.affine = True  # pyright: ignore[reportArgumentType]


def affine_of_call(call: Call) -> Affine:
    """Scale and shift of a batch normalization."""
    return Affine(*affine_of(call.module))
