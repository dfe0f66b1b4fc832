"""Export and compile folded and converted models of torchvision and timm: whatever the original can, they can.

`torch.export` and `torch.compile` are tried on each folded model, and on one in four also after its batch norms became
bnkit's. The program must give what the model gives. Where one fails it is tried on the original too, to tell our
failures from the model's own. This takes hours, so models come in the order of a hash of their names: as many as were
looked at are a sample without bias, and a later run goes on behind those in the table.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import io
import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from _harness import saved_rows
from _surgery_models import hash_of, in_order_of_hash, names, ready
from _surgery_sweep import swept
from torch import nn

from bnkit import surgery
from bnkit._checks import FailedCheck
from bnkit.surgery._verify import relative_error

_TABLE = "surgery_programs"
Program = Callable[[nn.Module, tuple[Any, ...]], Any]


@dataclasses.dataclass(frozen=True)
class Row:
    """Whether the changed models of one original become programs: yes, "no" (the original does), or "nor the original".

    `compile` is "in parts" where, as with the original, one graph can't hold the model.
    """

    model: str
    folded_export: str = ""
    folded_compile: str = ""
    converted_export: str = ""
    converted_compile: str = ""
    why: str = ""


def examine(name: str, backend: str) -> Row | None:
    """Fold and convert one model and make programs of both; None for a model without batch norms."""
    if (prepared := ready(name)) is None:
        return None
    model, example, forward = prepared
    if forward is None:
        arguments: tuple[Any, ...] = (example,)
    else:  # of detectors, of which rounding may turn the decisions
        model, example = model.double(), example.double()
        arguments = ([example],)
    changed = {"folded": surgery.fold(model, example, forward=forward, tolerance=1.0).model}
    if hash_of(name) % 4 == 0:
        changed["converted"] = surgery.convert(model, "batch").model
    found, reasons = {}, {}
    for kind, result in changed.items():
        for verb, try_it in {"export": _exporting, "compile": _compiling(backend)}.items():
            found[f"{kind}_{verb}"], reasons[f"{kind}_{verb}"] = try_it(result, model, arguments)
    why = "; ".join(f"{key}: {reason}" for key, reason in reasons.items() if reason)
    return Row(name, **found, why=why)


def _exporting(changed: nn.Module, original: nn.Module, arguments: tuple[Any, ...]) -> tuple[str, str]:
    return _outcome(_exported, changed, original, arguments)


def _compiling(backend: str) -> Callable[..., tuple[str, str]]:
    def compiling(changed: nn.Module, original: nn.Module, arguments: tuple[Any, ...]) -> tuple[str, str]:
        whole, why = _outcome(_compiled(backend, True), changed, original, arguments)
        if whole != "nor the original":
            return whole, why
        parts, why_parts = _outcome(_compiled(backend, False), changed, original, arguments)
        return ("in parts", why) if parts == "yes" else (parts, why_parts)

    return compiling


def _outcome(program: Program, changed: nn.Module, original: nn.Module, arguments: tuple[Any, ...]) -> tuple[str, str]:
    why = _failure(program, changed, arguments)
    if not why:
        return "yes", ""
    return ("nor the original" if _failure(program, original, arguments) else "no"), why


def _failure(program: Program, model: nn.Module, arguments: tuple[Any, ...]) -> str:
    """Why the program can't be made, or gives something else than the model; "" where it is right."""
    torch.compiler.reset()
    try:
        # torch.export prints a graph that it can't finish, whole.
        with torch.no_grad(), contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            error = relative_error(program(model, arguments), model(*arguments))
    except Exception as failure:  # any failure is the finding
        return " ".join(f"{type(failure).__name__}: {failure}".split())[:150]
    finally:
        torch.compiler.reset()
        gc.collect()
    return "" if error <= 1e-4 else f"differs by {error:.1e}"


def _exported(model: nn.Module, arguments: tuple[Any, ...]) -> Any:
    return torch.export.export(model, arguments).module()(*arguments)


def _compiled(backend: str, whole: bool) -> Program:
    return lambda model, arguments: torch.compile(model, backend=backend, fullgraph=whole)(*arguments)


def main(everything: bool, save: bool, only: Sequence[str] = ()) -> None:
    """Print a row for each model; with `save`, put each into `benchmarks/results/surgery_programs.csv` at once.

    Of one model a family graphs are made down to kernels (`aot_eager`); of everything, of Python's functions.

    Raises:
        FailedCheck: after all rows, if a changed model is no program where its original is one.
    """
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)  # a graph that can't be made is printed whole
    rows = []
    done = saved_rows(_TABLE, ["model"]) if save and not only else {}
    left = (name for name in in_order_of_hash(names(everything, only)) if name not in done)
    backend = "eager" if everything else "aot_eager"
    for row in swept(
        left, lambda name: examine(name, backend), lambda name, why: Row(name, why=why), _TABLE if save else None
    ):
        rows.append(row)
        print(*(f"{text:45}" if i == 0 else f"{text:9}" for i, text in enumerate(dataclasses.astuple(row))), flush=True)
    ours = [row.model for row in rows if "no" in dataclasses.astuple(row) or row.why.startswith("failed:")]
    print(f"{len(rows)} models.")
    if ours:
        raise FailedCheck(f"what the original can, ours must, but not so on {', '.join(ours)}: see their rows.")
