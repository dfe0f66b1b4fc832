"""`bnkit convert`."""

from __future__ import annotations

import ast
import json as json_module
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .._checks import require
from .._weights import save_weights
from ._models import ModelName, ModelOptions, load_model


def convert(
    model: ModelName,
    checkpoint: Annotated[Path | None, typer.Argument(help="Its weights: safetensors, or torch.save data.")] = None,
    to: Annotated[str, typer.Option(help="batch, sync, ghost, frozen, renorm, group, layer, instance or torch.")] = (
        "batch"
    ),
    where: Annotated[list[str] | None, typer.Option(help="Names or patterns of layers.  [default: all]")] = None,
    norm_option: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Given to the new layers; may be repeated.")
    ] = None,
    option: ModelOptions = None,
    out: Annotated[Path | None, typer.Option(help="File to write the weights to.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the report.")] = False,
) -> None:
    """Make another kind of norm of a model's batch norms, and report which layers change."""
    from .. import surgery

    pairs = [text.partition("=") for text in norm_option or ()]
    for name, separator, _ in pairs:
        require(bool(name and separator), f"--norm-option is NAME=VALUE, got {name!r}: write it like ghost_size=16.")
    options = {name: _value(text) for name, _, text in pairs}
    result = surgery.convert(load_model(model, option, checkpoint), to, where or None, inplace=True, **options)
    if out is not None:
        save_weights(result.model, out)
    if json:
        print(json_module.dumps({"changed": result.changed, "skipped": result.skipped}, indent=2))
    else:
        Console().print(repr(result), markup=False, highlight=False, soft_wrap=True)


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
