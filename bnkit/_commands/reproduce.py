"""`bnkit reproduce`: a claim of the literature, put to the test."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json as json_module
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .._checks import require, unknown
from .._processes import rank

EXPERIMENTS: Mapping[str, tuple[str, str]] = {
    "small-batches": (
        "small_batches",
        "Batches of two: batch, renorm, group, under torchrun also sync (Ioffe 2017; Wu and He 2018).",
    ),
    "large-batches": ("large_batches", "Ghost statistics in large batches (Hoffer et al. 2017)."),
    "sequential-digits": ("sequential_digits", "Batch norm in the recurrence of an LSTM (Cooijmans et al. 2016)."),
    "domains": ("domains", "Statistics for each of two domains (Chang et al. 2019)."),
    "padding": ("padding", "Statistics that leave padding out."),
    "corruptions": (
        "corruptions",
        "Adapting to corrupted images by statistics alone (Schneider et al. 2020); needs --data and --weights.",
    ),
    "insertion": ("insertion", "Batch norm inserted into a trained VGG-11, then higher rates; needs --data."),
    "fine-tuning": ("fine_tuning", "Frozen statistics in small batches (He et al. 2015)."),
}
"""By name: the module of `bnkit.experiments`, with a function of its name and a `page_of`, and what it is about.

The function takes `progress`, and `data` or `weights` if it needs those options, without a default if it can't do
without."""


def reproduce(
    name: Annotated[str, typer.Argument(help=f"Which: {', '.join(EXPERIMENTS)}; or list.")],
    data: Annotated[
        str | None, typer.Option(help="Images, for the experiments that need them: a set's name, a folder or a .zip.")
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="Trained weights, for the experiments that need them: a file or a folder.")
    ] = None,
    threads: Annotated[int, typer.Option(help="CPU threads; the networks are small.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Folder for report.html and run.json.  [default: none]")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print every run as JSON instead of the table.")] = False,
) -> None:
    """Test a claim of the literature on a CPU, and say what came out."""
    if name == "list":
        for key, (_, about) in EXPERIMENTS.items():
            print(f"{key:<20}{about}")
        return
    if name not in EXPERIMENTS:
        raise unknown("experiment", name, [*EXPERIMENTS, "list"])
    module = importlib.import_module(f"..experiments.{EXPERIMENTS[name][0]}", __package__)
    experiment = getattr(module, EXPERIMENTS[name][0])
    options = _options(name, experiment, {"data": data, "weights": weights})
    _run(experiment, module.page_of, options, threads, out, json)


def _options(name: str, experiment: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the options that were given, if they are what the experiment takes."""
    taken = inspect.signature(experiment).parameters
    for option, value in given.items():
        require(value is None or option in taken, f"{name} takes no --{option}, got {value}: leave it out.")
        needed = option in taken and taken[option].default is inspect.Parameter.empty
        require(value is not None or not needed, f"{name} needs --{option}: see bnkit reproduce --help.")
    return {option: value for option, value in given.items() if value is not None}


def _run(
    experiment: Callable[..., Any],
    page_of: Callable[..., Any],
    options: Mapping[str, Any],
    threads: int,
    out: Path | None,
    as_json: bool,
) -> None:
    import torch

    from .._files import check_writable
    from ..report import LiveProgress, print_page

    first = rank() == 0
    if first and out is not None:
        check_writable(out)
    torch.set_num_threads(threads)
    console = Console(stderr=as_json, quiet=not first)
    with LiveProgress(console).shown() as progress:
        result = experiment(**options, progress=progress)
    if not first:
        return
    page = page_of(result, shlex.join(["bnkit", *sys.argv[1:]]))
    found = json_module.dumps(_found(result, page), indent=2, default=str)
    if out is not None:
        _save(page, found, out)
    if as_json:
        print(found)
    else:
        print_page(page, console)


def _found(result: Any, page: Any) -> object:
    """All that came out and where, as plain values."""
    from .._environment import describe_machine

    about = {"claim": page.claim, "summary": list(page.summary), "command": page.command}
    return _finite({**about, **dataclasses.asdict(result), "environment": describe_machine()})


def _save(page: Any, found: str, out: Path) -> None:
    from .._files import write_text
    from ..report import save_page

    write_text(out / "run.json", found + "\n")
    save_page(page, out / "report.html")


def _finite(value: object) -> object:
    """JSON has no NaN: null stands for what a diverged run has not got."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and value != value else value
