"""The command line.

Exit codes: 0 success, 1 a finding or a failed check, 2 bad use.
"""

from __future__ import annotations

import sys
from typing import Any

import typer
from typer.core import TyperGroup

from ._allocator import tune_allocator
from ._checks import FailedCheck, UserError
from ._commands import adapt, bench, compare, convert, evaluate, fold, insert, models, recalibrate, reproduce, train


class _Commands(TyperGroup):
    """Commands whose errors are one line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            print(f"bnkit: {error}", file=sys.stderr)
            raise typer.Exit(1 if isinstance(error, FailedCheck) else 2) from error


app = typer.Typer(
    cls=_Commands,
    help="Batch normalization for PyTorch, end to end.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(compare.compare)
app.command()(train.train)
app.command()(evaluate.evaluate)
app.command()(models.models)
app.command()(recalibrate.recalibrate)
app.command()(adapt.adapt)
app.command()(convert.convert)
app.command()(insert.insert)
app.command()(fold.fold)
app.command()(reproduce.reproduce)
app.add_typer(bench.app, name="bench")


@app.callback()
def _root() -> None:
    """Batch normalization for PyTorch, end to end."""


def main() -> None:
    """The entry point of the `bnkit` command."""
    tune_allocator()
    app()
