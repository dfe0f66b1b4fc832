"""Fold and convert over the models of torchvision and timm: what folds, what doesn't and why, and how exact it is.

A row tells the batch norms found and folded, the reasons of those left, the largest relative difference of the
outputs in eval mode, in float32 and, for models that are not large, in float64, and beside it how far the model's own
outputs in float32 are from those in float64: a deep random network amplifies any rounding. It also tells whether the
folded model pickles, and whether the batch norms become each kind that keeps statistics and again what they were, to
the bit (`_surgery_checks.py`). Two other examinations are on request, each with a table of its own:
`_surgery_programs.py` exports and compiles, `_surgery_speed.py` times.
"""

from __future__ import annotations

import collections
import dataclasses
import re
import warnings
from collections.abc import Sequence

import _surgery_programs
import _surgery_speed
import torch
from _surgery_checks import CHECKS, fault
from _surgery_models import names, ready
from _surgery_sweep import swept
from torch import Tensor, nn

from bnkit import surgery
from bnkit._checks import FailedCheck
from bnkit.surgery._verify import relative_error

_LARGE = 30e6  # parameters
_TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class Row:
    """What surgery on one model gave."""

    model: str
    found: int = 0
    folded: int = 0
    left: str = ""
    error: float | None = None
    error_float64: float | None = None
    own_rounding: float | None = None
    checks: str = ""


def examine(name: str) -> Row:
    """Fold one model and check what came out."""
    if (prepared := ready(name)) is None:
        return Row(name)
    model, example, forward = prepared
    size = sum(parameter.numel() for parameter in model.parameters())
    error = error_float64 = own_rounding = None
    if forward is None:
        result = surgery.fold(model, example, tolerance=1.0)
        error = result.max_error or 0.0
        if size < _LARGE or error > _TOLERANCE:
            error_float64, own_rounding = _in_float64(model, example)
    else:  # what a detector keeps is decided by comparisons, which rounding may turn
        model, example = model.double(), example.double()
        result = surgery.fold(model, example, forward=forward, tolerance=1e-9)
        error_float64 = result.max_error
    faults = {kind: fault(check, model, result.model, example, forward) for kind, check in CHECKS.items()}
    failed = [f"failed: {kind}, {why}" for kind, why in faults.items() if why]
    failed += ["failed: inexact"] * (error is not None and error > max(_TOLERANCE, 3 * (own_rounding or 0.0)))
    found = len(result.changed) + len(result.skipped)
    left = "; ".join([*failed, *_reasons(result.skipped)])
    checks = " ".join(kind for kind, why in faults.items() if not why)
    return Row(name, found, len(result.changed), left, error, error_float64, own_rounding, checks)


def _in_float64(model: nn.Module, example: Tensor) -> tuple[float | None, float | None]:
    """The error of folding in float64, and that of the model itself in float32: how much it amplifies rounding."""
    with torch.no_grad():
        single = model(example)
    try:
        double = model.double()
        with torch.no_grad():
            own = relative_error(single, double(example.double()))
        return surgery.fold(double, example.double(), tolerance=1e-9).max_error, own
    except RuntimeError:  # a forward that makes float32 tensors of its own
        return None, None
    finally:
        model.float()


def _reasons(skipped: dict[str, str]) -> list[str]:
    short = (re.sub(r"[: ]*(by \w+ in|in dimension) .*", "", reason.split(";")[0]) for reason in skipped.values())
    return [f"{count} × {reason}" for reason, count in collections.Counter(short).most_common(3)]


def main(everything: bool, save: bool, what: str, only: Sequence[str] = (), compile_too: bool = True) -> None:
    """Print a row for each model; with `save`, put each into `benchmarks/results/surgery.csv` as soon as it is known.

    Rows of models not looked at this time stay in the file. `what` may also be "export" or "speed".

    Raises:
        FailedCheck: after all rows, if any failed.
    """
    if what == "export":
        _surgery_programs.main(everything, save, only)
    elif what == "speed":
        _surgery_speed.main(everything, save, only, compile_too)
    else:
        _fold_and_convert(everything, save, only)


def _fold_and_convert(everything: bool, save: bool, only: Sequence[str]) -> None:
    warnings.filterwarnings("ignore")
    rows = []
    for row in swept(
        names(everything, only), examine, lambda name, why: Row(name, left=why), "surgery" if save else None
    ):
        rows.append(row)
        print(_line(row), flush=True)
    _summarize(rows)


def _line(row: Row) -> str:
    errors = " ".join("       " if e is None else f"{e:7.1e}" for e in (row.error, row.error_float64, row.own_rounding))
    return f"{row.model:45} {row.folded:4}/{row.found:<4} {errors}  {row.checks}  {row.left}"


def _summarize(rows: Sequence[Row]) -> None:
    worked = [row for row in rows if row.found]
    worst = max((row.error for row in worked if row.error is not None), default=0.0)
    folded, found = sum(row.folded for row in worked), sum(row.found for row in worked)
    print(f"{len(rows)} models, {len(worked)} with batch norms: {folded} of {found} folded, largest error {worst:.1e}.")
    if failed := [row.model for row in rows if "failed:" in row.left]:
        raise FailedCheck(f"surgery must hold on every model, but failed on {', '.join(failed)}: see their rows.")
