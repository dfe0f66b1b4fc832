"""`bnkit compare`."""

from __future__ import annotations

import json as json_module
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .._processes import rank, world_size


def compare(
    steps: Annotated[int, typer.Option(help="Mini-batches each network sees.")] = 50_000,
    lr: Annotated[float | None, typer.Option(help="Learning rate of all.  [default: 0.5 for mlp, else 0.05]")] = None,
    batch_size: Annotated[int, typer.Option(help="Images a step.")] = 60,
    norms: Annotated[str, typer.Option(help="Norms to compare, separated by commas.")] = "none,batch",
    model: Annotated[str, typer.Option(help="One of bnkit's models, such as mlp or bnkit:vgg11.")] = "mlp",
    data: Annotated[str, typer.Option(help="A set's name, or a folder or .zip of class folders of images.")] = "digits",
    data_dir: Annotated[str | None, typer.Option(help="Where downloaded data sets lie.")] = None,
    download: Annotated[bool, typer.Option("--download", help="Download the data set if it is missing.")] = False,
    image_size: Annotated[
        int | None, typer.Option(help="Side to resize the images to.  [default: their own; 32 for a folder]")
    ] = None,
    skip_corrupt: Annotated[bool, typer.Option("--skip-corrupt", help="Leave out images that can't be read.")] = False,
    seed: Annotated[int, typer.Option(help="Decides initial weights and order of batches.")] = 0,
    seeds: Annotated[int, typer.Option(help="Runs of each network, with consecutive seeds.")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="Leave out the grid and each network's own best.")] = False,
    grid_steps: Annotated[int, typer.Option(help="Mini-batches each cell of the grid sees.")] = 1000,
    out: Annotated[Path | None, typer.Option(help="Output folder.  [default: runs/compare-TIME]")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.  [default: PyTorch's]")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print run.json instead of tables.")] = False,
) -> None:
    """Show what batch normalization buys: a network without and with it, on the same batches.

    Start it with torchrun for several processes that share each batch; networks that train as one stack use one.
    """
    from ..experiments import CompareConfig

    config = CompareConfig(
        model=model,
        data=data,
        norms=tuple(name.strip() for name in norms.split(",") if name.strip()),
        steps=steps,
        learning_rate=lr,
        batch_size=batch_size,
        seed=seed,
        seeds=seeds,
        quick=quick,
        grid_steps=grid_steps,
        image_size=image_size,
        threads=threads,
        device=device,
        devices=world_size(),
        data_dir=data_dir,
        download=download,
        skip_corrupt=skip_corrupt,
    )
    _compare(config, out or Path("runs") / time.strftime("compare-%Y%m%d-%H%M%S"), json)


def _compare(config: Any, out: Path, as_json: bool) -> None:
    from .. import experiments
    from .._files import check_writable
    from ..report import LiveProgress, print_page

    first = rank() == 0
    if first:
        check_writable(out)
    elif config.stacked:
        return  # a stack of small networks trains on one process
    console = Console(stderr=as_json, quiet=not first)
    command = shlex.join(["bnkit", *sys.argv[1:]])
    with LiveProgress(console).shown() as progress:
        result = experiments.compare(config, progress=progress)
    if not first:
        return
    experiments.save(result, out, command)
    if as_json:
        print(json_module.dumps(experiments.to_dict(result, command), indent=2, allow_nan=False))
    else:
        print_page(experiments.page_of(result, command), console)
        console.print(f"Files: {out}/report.html, metrics.csv, run.json and the figures as SVG.")
