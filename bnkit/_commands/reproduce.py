"""`bnkit reproduce`: a claim of the literature, put to the test."""

from __future__ import annotations

import dataclasses
import importlib
import json as json_module
import shlex
import sys
from collections.abc import Mapping
from typing import Annotated

import typer
from rich.console import Console

from .._checks import unknown

EXPERIMENTS: Mapping[str, tuple[str, str]] = {
    "small-batches": (
        "small_batches",
        "Batches of two: batch norm, batch renorm, group norm (Ioffe 2017; Wu and He 2018).",
    ),
    "large-batches": ("large_batches", "Ghost statistics in large batches (Hoffer et al. 2017)."),
    "sequential-digits": ("sequential_digits", "Batch norm in the recurrence of an LSTM (Cooijmans et al. 2016)."),
}
"""By name: the module of `bnkit.experiments`, with a function of its name and a `page_of`, and what it is about."""


def reproduce(
    name: Annotated[str, typer.Argument(help=f"Which: {', '.join(EXPERIMENTS)}; or list.")],
    threads: Annotated[int, typer.Option(help="CPU threads; the networks are small.")] = 1,
    json: Annotated[bool, typer.Option("--json", help="Print every run as JSON instead of the table.")] = False,
) -> None:
    """Test a claim of the literature on the bundled digits, in minutes on a CPU, and say what came out."""
    if name == "list":
        for key, (_, about) in EXPERIMENTS.items():
            print(f"{key:<20}{about}")
        return
    if name not in EXPERIMENTS:
        raise unknown("experiment", name, [*EXPERIMENTS, "list"])
    _run(EXPERIMENTS[name][0], threads, json)


def _run(module_name: str, threads: int, as_json: bool) -> None:
    import torch

    from ..report import LiveProgress, print_page

    torch.set_num_threads(threads)
    module = importlib.import_module(f"..experiments.{module_name}", __package__)
    console = Console(stderr=as_json)
    with LiveProgress(console).shown() as progress:
        result = getattr(module, module_name)(progress=progress)
    page = module.page_of(result, shlex.join(["bnkit", *sys.argv[1:]]))
    if as_json:
        found = dataclasses.asdict(result) | {"claim": page.claim, "summary": list(page.summary)}
        print(json_module.dumps(_finite(found), indent=2))
    else:
        print_page(page, console)


def _finite(value: object) -> object:
    """JSON has no NaN: null stands for what a diverged run has not got."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and value != value else value
