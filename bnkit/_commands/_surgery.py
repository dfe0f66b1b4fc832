"""What `insert`, `fold` and `convert` share: the example, the files they write, the report they print."""

from __future__ import annotations

import contextlib
import io
import json as json_module
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from .._checks import FailedCheck, UserError, require, words_of
from .._weights import save_weights

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.export import ExportedProgram

    from ..surgery import Surgery

Checkpoint = Annotated[Path | None, typer.Argument(help="Its weights: safetensors, or torch.save data.")]
Where = Annotated[list[str] | None, typer.Option(help="Names or patterns of layers; may be repeated.  [default: all]")]
Tolerance = Annotated[float | None, typer.Option(help="Largest relative difference of outputs.  [default: 1e-4]")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of the report.")]
SHAPE_HELP = "The shape of one input, such as 3,224,224."


def example_of(shape: str) -> Tensor:
    """Two inputs of normal values, always the same."""
    import torch

    try:
        sizes = [int(size) for size in shape.split(",")]
    except ValueError:
        raise UserError(
            f"--shape must be numbers with commas between, got {shape!r}: write it like 3,224,224."
        ) from None
    require(min(sizes) >= 1, f"--shape must be of sizes of at least 1, got {shape!r}: write it like 3,224,224.")
    return torch.randn(2, *sizes, generator=torch.Generator().manual_seed(0))


def run(model: nn.Module, example: Tensor) -> Tensor:
    """The model on an example; says which shape failed."""
    try:
        return model(example)
    except Exception as error:  # of any type: timm's models assert
        raise UserError(
            f"the model must run on inputs of shape {tuple(example.shape)}, but fails ({_short(error)}): "
            "give the right --shape."
        ) from error


def finish(result: Surgery, out: Path | None, as_json: bool, example: Tensor | None = None) -> None:
    """Write the model, as weights or, where there is an example to trace it on, as a program; print the report."""
    if out is not None:
        _write(result.model, out, example)
    if as_json:
        names = ("changed", "skipped", "max_error", "training_error")
        facts = {name: getattr(result, name) for name in names}
        print(json_module.dumps({**facts, "out": None if out is None else str(out)}, indent=2))
        return
    wrote = "" if out is None else f"\nWrote {out}."
    Console().print(f"{result}{wrote}", markup=False, highlight=False, soft_wrap=True)


def _write(model: nn.Module, out: Path, example: Tensor | None) -> None:
    import torch

    from .._files import check_writable, written_aside

    check_writable(out.parent)
    if out.suffix != ".pt2":
        save_weights(model, out)
        return
    if example is None:
        raise UserError(f"only fold and insert write programs, got {out}: name a .safetensors or .pt file.")
    program = _exported(model, example, out)
    with written_aside(out) as temporary, open(temporary, "wb") as file:
        torch.export.save(program, file)


def _exported(model: nn.Module, example: Tensor, out: Path) -> ExportedProgram:
    """A program for batches of any size; a model that torch can't make one of ends the command."""
    import torch

    # Two images, if need be the same one: of a batch of one, torch.export would make a constant.
    examples, sizes = (example[[0, -1]],), ({0: torch.export.Dim("batch")},)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # torch prints the graph up to where it gave up
            return torch.export.export(model.eval(), examples, dynamic_shapes=sizes)
    except Exception as error:
        raise FailedCheck(
            f"a program must be of a model that torch.export takes, got one that fails ({_short(error)}): "
            f"write the weights, with --out {out.with_suffix('.safetensors')} or {out.with_suffix('.pt')}."
        ) from error


def _short(error: Exception) -> str:
    return textwrap.shorten(words_of(error), 300, placeholder=" ...")
