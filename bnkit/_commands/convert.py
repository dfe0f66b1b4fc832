"""`bnkit convert`."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated

import typer

from .._checks import require
from ._models import ModelName, ModelOptions, load_model, name_and_value
from ._surgery import SHAPE_HELP, Checkpoint, Json, Tolerance, Where, example_of, finish, run


def convert(
    model: ModelName,
    checkpoint: Checkpoint = None,
    to: Annotated[str, typer.Option(help="batch, sync, ghost, frozen, renorm, group, layer, instance or torch.")] = (
        "batch"
    ),
    where: Where = None,
    shape: Annotated[str | None, typer.Option(help=f"{SHAPE_HELP} Outputs are compared on it.")] = None,
    tolerance: Tolerance = None,
    norm_option: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Given to the new layers; may be repeated.")
    ] = None,
    option: ModelOptions = None,
    out: Annotated[Path | None, typer.Option(help="File to write the weights to.")] = None,
    json: Json = False,
) -> None:
    """Make another kind of norm of a model's batch norms, and report which layers change."""
    from .. import surgery

    options = dict(name_and_value(text, "--norm-option", "ghost_size=16") for text in norm_option or ())
    own = sorted(inspect.signature(surgery.convert).parameters.keys() & options.keys())
    require(not own, f"--norm-option is for the new layers, got {', '.join(own)} of convert itself: leave it out.")
    require(
        shape is not None or tolerance is None,
        "--tolerance is for outputs, which there are only of inputs of a --shape: give one like 3,224,224.",
    )
    result = surgery.convert(
        load_model(model, option, checkpoint),
        to,
        where or None,
        inplace=True,
        example=None if shape is None else example_of(shape),
        forward=run,
        tolerance=tolerance,
        **options,
    )
    finish(result, out, json)
