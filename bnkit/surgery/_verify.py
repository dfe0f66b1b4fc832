"""How far one model's outputs are from another's."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import FailedCheck, UserError
from .._modes import buffers_kept, evaluating
from ..graph import Forward, apart, apply, feed, tensors_in
from ._operation import check_initialized

_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def check_has_values(model: nn.Module) -> None:
    """Refuse a model that has nothing to compute with.

    Raises:
        UserError: a parameter or buffer is on the meta device, or of a lazy layer that never ran.
    """
    check_initialized(model)
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_meta:
            raise UserError(
                f"a model must have values to be run and compared, but {name} is on the meta device: "
                "to_empty(device='cpu') and load_state_dict first."
            )


def run_in_eval(model: nn.Module, example: Any, forward: Forward | None) -> Any:
    """The model's output in eval mode, without gradients; random numbers as from the state they are in now.

    Raises:
        UserError: the model has no values, or returns no tensor.
    """
    check_has_values(model)
    with evaluating(model), buffers_kept(model), torch.no_grad(), torch.random.fork_rng():
        output = apply(model, apart(example), forward)
    if next(tensors_in(output), None) is None:
        raise UserError(
            f"a model must return tensors to be compared, got {type(output).__name__}: pass forward=, a function "
            "(model, example) that returns tensors."
        )
    return output


def run_changed(model: nn.Module, example: Any, forward: Forward | None, verb: str) -> Any:
    """`run_in_eval` of a model that ran before it was changed.

    Raises:
        FailedCheck: it no longer does.
    """
    with still_runs(verb):
        return run_in_eval(model, example, forward)


@contextlib.contextmanager
def still_runs(verb: str) -> Iterator[None]:
    """Say of an error that the model, which ran before it was changed, no longer does.

    Raises:
        FailedCheck: instead of any error.
    """
    try:
        yield
    except FailedCheck:
        raise
    except Exception as error:
        # A `forward` may have put the error into words that make sense of a model as it was given.
        cause = error.__cause__ if isinstance(error, UserError) and error.__cause__ else error
        words = f"{type(cause).__name__}: {' '.join(str(cause).split())[:200]}"
        raise FailedCheck(
            f"{verb} must leave a model that runs, but it raises {words}; nothing was changed. Something in it may "
            "ask a replaced layer for what only that had: leave such layers out with where=."
        ) from error


def relative_error(found: Any, expected: Any, floors: Sequence[float] = ()) -> float:
    """The largest difference between two outputs, relative to the largest value of each tensor in `expected`, or to
    the tensor's floor, if there is one and it is larger.

    Infinite where structure, shapes, or the places of values that are not finite differ.
    """
    pairs = zip(zip_longest_tensors(found, expected), itertools.chain(floors, itertools.repeat(0.0)), strict=False)
    return max((_relative_error(a, b, floor) for (a, b), floor in pairs), default=0.0)


def largest_values(output: Any) -> list[float]:
    """The largest finite value of each tensor, 0 where there is none."""
    tensors = (tensor.detach().to_dense().abs().double() for tensor in tensors_in(output))
    return [float(finite.max()) if (finite := t[t.isfinite()]).numel() else 0.0 for t in tensors]


def zip_longest_tensors(found: Any, expected: Any) -> Iterator[tuple[Tensor | None, Tensor | None]]:
    """The tensors of two outputs, pair by pair; None where one has fewer."""
    first, second = list(tensors_in(found)), list(tensors_in(expected))
    for index in range(max(len(first), len(second))):
        yield (first[index] if index < len(first) else None, second[index] if index < len(second) else None)


def _relative_error(found: Tensor | None, expected: Tensor | None, floor: float) -> float:
    if found is None or expected is None or found.shape != expected.shape:
        return float("inf")
    if expected.numel() == 0:
        return 0.0
    a, b = (t.detach().to_dense().to(torch.complex128) for t in (found, expected))
    finite = b.isfinite()
    if not torch.equal(a.isfinite(), finite) or not _same(a[~finite], b[~finite]):
        return float("inf")
    a, b = a[finite], b[finite]
    if b.numel() == 0:
        return 0.0
    difference, size = float((a - b).abs().max()), max(float(b.abs().max()), floor)
    return difference / size if size > 0 else (0.0 if difference == 0 else float("inf"))


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.real.nan_to_num(7), b.real.nan_to_num(7))


def tolerance_for(output: Any, tolerance: float | None) -> float:
    """The tolerance asked for, or the one usual for the outputs' least precise type."""
    if tolerance is not None:
        return tolerance
    found = [_TOLERANCES[tensor.dtype] for tensor in tensors_in(output) if tensor.dtype in _TOLERANCES]
    return max(found, default=1e-4)


def check(error: float, tolerance: float, verb: str) -> None:
    """Refuse a result that differs by more than `tolerance`.

    Raises:
        FailedCheck: it does.
    """
    if not error <= tolerance:
        raise FailedCheck(
            f"{verb} must leave the outputs as they were, but they differ by {error:.1e} relative to the largest, "
            f"beyond tolerance={tolerance:.0e}; nothing was changed. Raise tolerance if rounding explains it (try in "
            "float64), or leave modules out with where=."
        )


def largest_error(model: nn.Module, original: nn.Module, batches: Iterable[Any], forward: Forward | None) -> float:
    """`relative_error` of two models over batches of a data loader, in eval mode."""
    fed = forward or feed
    errors = (relative_error(run_in_eval(model, batch, fed), run_in_eval(original, batch, fed)) for batch in batches)
    return max(errors, default=0.0)
