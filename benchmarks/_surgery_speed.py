"""Inference on folded models of torchvision and timm: how many times faster than the model as it is.

Beside it `torch.fx`'s `fuse` of the model, and `torch.compile` (`bench_fold.py` compiles folded networks too). In eval
mode, float32, contiguous, under `bnkit.tune_allocator()`, on batches of 1 and of 32 of the smallest images the model
runs on. All sides of a model take turns; each side's outputs are first held against those of the model as it is, but
for detectors, whose decisions rounding may turn. Compiling takes hours: a later run goes on behind the models in the
table.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from _harness import quantiles, saved_rows, take_turns
from _surgery_models import in_order_of_hash, names, ready
from _surgery_sweep import swept
from torch import nn

from bnkit import surgery
from bnkit._allocator import tune_allocator
from bnkit._checks import FailedCheck
from bnkit.surgery._verify import relative_error

BATCHES = (1, 32)
SIDES = ("fold", "fx", "compile")
_TABLE = "surgery_speed"
_SECONDS = 8.0  # that one model's rounds with one batch may take, where three rounds take no longer
_LONGEST_CALL = 10.0  # seconds; of what takes longer, as detectors do with 32 images, nothing is timed
_SHORTEST_ROUND = 0.02  # seconds; faster calls are repeated


@dataclasses.dataclass(frozen=True)
class Row:
    """Of each batch size the milliseconds of the model as it is, and the ratio of that time to each side's.

    Only the milliseconds where they are too many. A ratio is a median over rounds in turns; "fails" where the side
    can't be made, "differs" where its outputs do, "" where it was not asked for.
    """

    model: str
    image: int = 0
    ms_1: float | str = ""
    fold_1: float | str = ""
    fx_1: float | str = ""
    compile_1: float | str = ""
    ms_32: float | str = ""
    fold_32: float | str = ""
    fx_32: float | str = ""
    compile_32: float | str = ""
    why: str = ""


@torch.no_grad()
def examine(name: str, compile_too: bool) -> Row | None:
    """Time one model and what others make of it; None for a model without batch norms."""
    if (prepared := ready(name)) is None:
        return None
    model, example, forward = prepared
    if forward is None:
        folded = surgery.fold(model, example, tolerance=1.0).model
    else:
        folded = surgery.fold(model.double(), example.double(), forward=forward).model.float()
        model.float()
    image = example[-1:] if forward is None else example[None]
    sides = _sides(model, folded, compile_too)
    found: dict[str, Any] = {}
    for batch in BATCHES:
        inputs = image.repeat(batch, 1, 1, 1)
        arguments = (inputs,) if forward is None else (list(inputs),)
        found |= _ratios(model, sides, arguments, batch, check=forward is None)
    return Row(name, image.shape[-1], **found)


def _sides(model: nn.Module, folded: nn.Module, compile_too: bool) -> dict[str, Callable[..., object] | None]:
    """None where one can't be made."""
    sides: dict[str, Callable[..., object] | None] = {"fold": folded, "fx": folded_by_fx(model)}
    if compile_too:
        sides["compile"] = torch.compile(model, dynamic=False)
    return sides


def folded_by_fx(model: nn.Module) -> nn.Module | None:
    """None where torch.fx can't trace it."""
    from torch.fx.experimental.optimization import fuse

    try:
        return fuse(copy.deepcopy(model))
    except Exception:  # whatever tracing or matching fails on is a finding
        return None


def _ratios(
    model: nn.Module,
    sides: Mapping[str, Callable[..., object] | None],
    arguments: tuple[Any, ...],
    batch: int,
    check: bool,
) -> dict[str, float | str]:
    start = time.perf_counter()
    expected = model(*arguments)
    if (seconds := time.perf_counter() - start) > _LONGEST_CALL:
        return {f"ms_{batch}": round(1e3 * seconds)}
    cases: dict[str, Callable[[], object]] = {"as it is": lambda: model(*arguments)}
    found: dict[str, float | str] = {}
    for side, network in sides.items():
        fault = _fault(network, arguments, expected if check else None)
        if network is None or fault:
            found[f"{side}_{batch}"] = fault
        else:
            cases[side] = lambda network=network: network(*arguments)
    times = _timed(cases)
    found[f"ms_{batch}"] = round(1e3 * quantiles(times["as it is"])[1], 2)
    for side in list(cases)[1:]:
        ratios = [a / b for a, b in zip(times["as it is"], times[side], strict=True)]
        found[f"{side}_{batch}"] = round(quantiles(ratios)[1], 3)
    torch.compiler.reset()
    return found


def _fault(network: Callable[..., object] | None, arguments: tuple[Any, ...], expected: object) -> str:
    """One of "fails" and "differs", "" where nothing is wrong. Outputs are compared if expected ones are given."""
    if network is None:
        return "fails"
    try:
        outputs = network(*arguments)
        return "" if expected is None or relative_error(outputs, expected) < 1e-3 else "differs"
    except Exception:  # whatever compiling fails on is a finding
        return "fails"


def _timed(cases: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
    """In as many rounds as there is time for, 3 to 7."""
    start = time.perf_counter()
    cases["as it is"]()
    once = time.perf_counter() - start
    repeats = max(1, round(_SHORTEST_ROUND / once))
    rounds = int(_SECONDS / (len(cases) * once * repeats))
    return take_turns(cases, min(max(rounds, 3), 7), warm_up=1, repeats=repeats)


def main(everything: bool, save: bool, only: Sequence[str] = (), compile_too: bool = True) -> None:
    """Print a row for each model; with `save`, put each into `benchmarks/results/surgery_speed.csv` at once.

    Raises:
        FailedCheck: after all rows, if a model could not be run, or its folded outputs are wrong.
    """
    tune_allocator()
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    rows: dict[str, dict[str, object]] = {}
    done = _saved() if save and not only else {}
    left = (
        name
        for name in in_order_of_hash(names(everything, only))
        if name not in done or (compile_too and not done[name]["compile_1"])
    )
    for row in swept(
        left, lambda name: examine(name, compile_too), lambda name, why: Row(name, why=why), _TABLE if save else None
    ):
        rows[row.model] = dataclasses.asdict(row)
        print(*(f"{v:45}" if key == "model" else f"{v!s:>7}" for key, v in rows[row.model].items()), flush=True)
    print_summary(_saved() if save else rows)
    if failed := [name for name, row in rows.items() if _failed(row)]:
        raise FailedCheck(f"folded models must run as the originals do, but not {', '.join(failed)}: see their rows.")


def _failed(row: Mapping[str, object]) -> bool:
    return bool(row["why"]) or any(row[f"fold_{batch}"] in ("fails", "differs") for batch in BATCHES)


def _saved() -> dict[str, dict[str, object]]:
    return saved_rows(_TABLE, [field.name for field in dataclasses.fields(Row)])


def print_summary(rows: Mapping[str, Mapping[str, object]]) -> None:
    """A line a batch and side: how many models it was timed on, and the ratio's percentiles over them."""
    for batch in BATCHES:
        for side in SIDES:
            column = [row[f"{side}_{batch}"] for row in rows.values()]
            ratios = [float(str(v)) for v in column if v not in ("", None, "fails", "differs")]
            failed = sum(v in ("fails", "differs") for v in column)
            if len(ratios) > 1:
                low, middle, high = quantiles(ratios)
                spread = f"median {middle:.2f}, p20 {low:.2f}, p80 {high:.2f}, {min(ratios):.2f} to {max(ratios):.2f}"
                print(f"batch {batch:2} {side:13} {len(ratios)} models: {spread}; fails on {failed}")
