"""What follows a batch normalization in a record: the addition and the activation that its layer can do itself."""

from __future__ import annotations

import dataclasses

from torch import nn

from ..graph import Call, Operator, Record, Value
from ..nn import Fused, activation_name
from ..ops import ACTIVATIONS, COMPOSED

_FUSED = ACTIVATIONS.keys() - COMPOSED  # the others are computed behind the layer all the same


@dataclasses.dataclass(frozen=True, eq=False)
class Following:
    """What a batch normalization's output goes through.

    Attributes:
        activation: its name, or None.
        activated: the operation that applies it.
        added: the addition before it, or None.
        residual: the other term.
    """

    activation: str | None = None
    activated: Operator | None = None
    added: Operator | None = None
    residual: Value | None = None


def following(call: Call, facts: Record) -> Following:
    """The addition and activation, in this order, that alone read a batch normalization's output."""
    value = call.outputs[0]
    reader = _only_reader(value, call, facts)
    if reader is None:
        return Following()
    residual = _residual(reader, value, call, facts)
    if residual is None:
        activation = activation_of(reader)
        return Following(activation, reader) if activation else Following()
    last = _only_reader(reader.outputs[0], None, facts)
    activation = activation_of(last) if last is not None else None
    return Following(activation, last if activation else None, reader, residual)


def activation_of(operator: Operator) -> str | None:
    """The activation that the fused layers know and that the operation computes."""
    if len(operator.inputs) != 1:
        return None
    name = operator.name
    if name == "leaky_relu" and operator.argument(1, "negative_slope", 0.01) != 0.01:
        return None
    if name == "gelu" and operator.argument(1, "approximate", "none") != "none":
        return None
    return name if name in _FUSED else None


def activation_of_module(module: nn.Module) -> str | None:
    """The activation that a module computes and the fused layers know."""
    name = activation_name(module)
    return name if name in _FUSED else None


def _only_reader(value: Value, call: Call | None, facts: Record) -> Operator | None:
    readers = [reader for reader in value.readers if call is None or not call.contains(reader)]
    if len(readers) != 1 or value.escapes:
        return None
    # A dropout that does nothing now hands its input on; it may do more in another mode.
    through = {type(c.module) for c in facts.calls if value in c.inputs and value in c.outputs}
    if through - {nn.Identity, Fused} or any("dropout" in name for name in value.handed_on):
        return None
    return readers[0]


def _residual(reader: Operator, value: Value, call: Call, facts: Record) -> Value | None:
    """The other term of an addition that is `value` + another of its shape; None if it is something else."""
    if reader.name not in ("add", "iadd") or len(reader.inputs) != 2 or reader.argument(2, "alpha", 1) != 1:
        return None
    first, second = reader.inputs
    other = second if first is value else first
    # Written in place, the other term would change for whoever else reads it; the input has to wait for the addition.
    in_place = reader.function.__name__ in ("add_", "__iadd__") and first is not value
    alone = all(call.contains(other_reader) for other_reader in call.inputs[0].readers) and not call.inputs[0].escapes
    alone &= facts.overwriting(call.inputs[0], since=value, before=reader) is None
    same = other.shape == value.shape and other.dtype == value.dtype and other is not value
    return other if same and alone and not in_place else None
