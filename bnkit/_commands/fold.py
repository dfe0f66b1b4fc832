"""`bnkit fold`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

import typer

from ._models import ModelName, ModelOptions, load_model
from ._surgery import SHAPE_HELP, Checkpoint, Json, Tolerance, Where, example_of, finish, run


def fold(
    model: ModelName,
    checkpoint: Checkpoint = None,
    shape: Annotated[str, typer.Option(help=SHAPE_HELP)] = "3,224,224",
    where: Where = None,
    padding: Annotated[str, typer.Option(help="Before a zero-padding convolution: refuse, or exact.")] = "refuse",
    rest: Annotated[str, typer.Option(help="What can't be folded: keep, or affine.")] = "keep",
    tolerance: Tolerance = None,
    option: ModelOptions = None,
    out: Annotated[
        Path | None, typer.Option(help="File to write: weights, or with .pt2 a program that runs without bnkit.")
    ] = None,
    json: Json = False,
) -> None:
    """Fold a model's batch norms into the layers around them, for inference, and report which could be."""
    from .. import surgery

    example = example_of(shape)
    result = surgery.fold(
        load_model(model, option, checkpoint),
        example,
        where=where or None,
        padding=cast(Any, padding),
        rest=cast(Any, rest),
        tolerance=tolerance,
        inplace=True,
        forward=run,
    )
    finish(result, out, json, example)
