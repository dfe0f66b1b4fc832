"""`bnkit models`."""

from __future__ import annotations

import json as json_module
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from .._checks import UserError, require, unknown

_CLASSES, _CHANNELS, _BATCH = 1000, 3, 32


def models(
    pattern: Annotated[str, typer.Argument(help="Which models, as a shell pattern such as 'vgg*'.")] = "*",
    norm: Annotated[str, typer.Option(help="The norm they are built with.")] = "batch",
    image_size: Annotated[int | None, typer.Option(help="Side of the images.  [default: each model's own]")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, layer by layer, instead of the table.")] = False,
) -> None:
    """List the models: parameters, and for one image multiply-adds, activation memory and the share of the norm."""
    from .. import models as registry

    names = registry.list(pattern)
    require(bool(names), f"no model is called {pattern!r}: `bnkit models` without a pattern lists all.")
    if norm not in registry.norms():
        raise unknown("norm", norm, registry.norms())
    require(
        image_size is None or image_size >= 1,
        f"--image-size must be at least 1, got {image_size}: choose a larger one.",
    )
    console = Console(stderr=True)
    shown = track(names, "Counting", console=console, transient=True, disable=not console.is_terminal)
    found = {name: _costs(name, norm, image_size) for name in shown}
    if all("error" in costs for costs in found.values()):
        raise UserError(found[names[0]]["error"])
    if json:
        print(json_module.dumps(found, indent=2))
    else:
        Console().print(_table(found, norm))


def _costs(name: str, norm: str, image_size: int | None) -> dict[str, Any]:
    """The counts of one model for one image, or why there are none."""
    import torch

    from .. import models as registry

    side: Any = image_size or registry.options(name)["image_size"]
    try:
        with torch.device("meta"):
            model = registry.create(name, norm, _CLASSES, _CHANNELS, image_size=side)
            found = registry.costs(model, torch.empty(_BATCH, _CHANNELS, side, side)).to_dict()
    except UserError as error:
        return {"image_size": side, "error": str(error)}
    for counts in (found, *found["layers"]):
        for count in ("multiply_adds", "activation_bytes", "norm_bytes", "other_bytes"):
            if count in counts:
                counts[count] /= _BATCH
    return {"image_size": side, **found}


def _table(found: dict[str, dict[str, Any]], norm: str) -> Table:
    table = Table(caption=f"norm={norm}, {_CLASSES} classes, {_CHANNELS} channels, float32; the last three an image")
    table.add_column("model")
    for head in ("pixels", "parameters (M)", "multiply-adds (M)", "activations (MB)", "norm's share of bytes moved"):
        table.add_column(head, justify="right")
    for name, costs in found.items():
        if "error" in costs:
            table.add_row(name, str(costs["image_size"]), costs["error"])
            continue
        numbers = (costs["parameters"] / 1e6, costs["multiply_adds"] / 1e6, costs["activation_bytes"] / 1e6)
        cells = [f"{number:,.2f}" for number in numbers]
        table.add_row(name, str(costs["image_size"]), *cells, f"{costs['norm_share']:.0%}")
    return table
