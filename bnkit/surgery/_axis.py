"""Where the channels of a value lie in the value before or after a function that leaves each channel whole."""

from __future__ import annotations

from ..graph import Operator, Value

_AVERAGES = frozenset({"adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"})
_SAME_PLACE = _AVERAGES | {"contiguous", "clone", "interpolate", "upsample"}
_RESHAPES = frozenset({"flatten", "view", "view_as", "reshape", "reshape_as", "unflatten", "squeeze", "unsqueeze"})


def axis_before(operator: Operator, axis: int) -> int | None:
    """The dimension of the function's input that holds what dimension `axis` of its output holds.

    None unless the function maps a scale and shift of each channel to the same scale and shift: it only moves values,
    or averages those of one channel with weights that sum to 1.
    """
    source, result = _ends(operator)
    if source is None or result is None:
        return None
    if operator.name in _SAME_PLACE or _is_whole_average(operator):
        return axis
    if operator.name in _RESHAPES:
        return _reshaped(source.shape, result.shape, axis)
    order = _order(operator, len(source.shape))
    return order[axis] if order else None


def axis_after(operator: Operator, axis: int) -> int | None:
    """The dimension of the function's output that holds dimension `axis` of its input; see `axis_before`."""
    source, result = _ends(operator)
    if source is None or result is None:
        return None
    if operator.name in _SAME_PLACE or _is_whole_average(operator):
        return axis
    if operator.name in _RESHAPES:
        return _reshaped(result.shape, source.shape, axis)
    order = _order(operator, len(source.shape))
    return order.index(axis) if order else None


def spread(operator: Operator) -> int | None:
    """How many features each channel becomes, where (N, C, *) is flattened to (N, C·k); None if it is not."""
    source, result = _ends(operator)
    if source is None or result is None or operator.name not in _RESHAPES or len(result.shape) != 2:
        return None
    batch, features = result.shape
    if len(source.shape) < 3 or source.shape[0] != batch or source.shape[1] == 0:
        return None
    return features // source.shape[1]


def _ends(operator: Operator) -> tuple[Value | None, Value | None]:
    if len(operator.inputs) != 1 or len(operator.outputs) != 1:
        return None, None
    source, result = operator.inputs[0], operator.outputs[0]
    return (source, result) if source.dtype == result.dtype else (None, None)


def _reshaped(source: tuple[int, ...], result: tuple[int, ...], axis: int) -> int | None:
    """The dimension of `source` that dimension `axis` of its reshaped `result` is: everything around it must agree."""
    before, size, after = result[:axis], result[axis], result[axis + 1 :]
    for candidate, source_size in enumerate(source):
        same = source_size == size and _product(source[:candidate]) == _product(before)
        if same and _product(source[candidate + 1 :]) == _product(after):
            return candidate
    return None


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _order(operator: Operator, dims: int) -> list[int] | None:
    """For a transposition: the dimension of the input that each dimension of the output is."""
    if operator.name in ("transpose", "swapaxes", "swapdims"):
        first, second = operator.argument(1, "dim0"), operator.argument(2, "dim1")
        if first is None or second is None:
            return None
        order = list(range(dims))
        order[first], order[second] = order[second], order[first]
        return order
    if operator.name == "permute":
        given = operator.arguments[0][1:] or (operator.argument(1, "dims"),)
        given = given[0] if isinstance(given[0], (tuple, list)) else given
        return [d % dims for d in given]
    return None


def _is_whole_average(operator: Operator) -> bool:
    """Whether it is an average pooling in which no padding counts."""
    if operator.name not in ("avg_pool1d", "avg_pool2d", "avg_pool3d"):
        return False
    padding = operator.argument(3, "padding", 0)
    padded = any(padding) if isinstance(padding, (tuple, list)) else bool(padding)
    return not padded and operator.argument(6, "divisor_override") is None
