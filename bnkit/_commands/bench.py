"""`bnkit bench`: run a file of the repository's `benchmarks/`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .._checks import UserError

app = typer.Typer(help="Measure speed, side by side with the alternatives.", no_args_is_help=True)


@app.command()
def compare(
    rounds: Annotated[int, typer.Option(help="Rounds of 200 steps.")] = 15,
    save: Annotated[bool, typer.Option("--save", help="Write benchmarks/results/compare.csv.")] = False,
) -> None:
    """Steps a second of `bnkit compare` against a plain PyTorch loop of the same two networks."""
    _benchmark("bench_compare").main(rounds, save)


@app.command()
def steps(
    rounds: Annotated[int, typer.Option(help="Steps of each network and setting.")] = 7,
    save: Annotated[bool, typer.Option("--save", help="Write benchmarks/results/steps.csv.")] = False,
    compiled: Annotated[bool, typer.Option(help="Also measure torch.compile, which takes most of the time.")] = True,
) -> None:
    """Training steps of ResNets on bnkit's layers against plain PyTorch, eager and compiled."""
    _benchmark("bench_steps").main(rounds, save, compiled)


@app.command()
def train(
    rounds: Annotated[int, typer.Option(help="Epochs of each side.")] = 5,
    save: Annotated[bool, typer.Option("--save", help="Write benchmarks/results/train.csv.")] = False,
) -> None:
    """Images a second of `bnkit train` against the usual training scripts."""
    _benchmark("bench_train").main(rounds, save)


@app.command()
def kernels(
    rounds: Annotated[int, typer.Option(help="Rounds in which all sides take turns.")] = 15,
    quick: Annotated[bool, typer.Option("--quick", help="A few shapes.")] = False,
    save: Annotated[bool, typer.Option("--save", help="Write benchmarks/results/kernels.csv.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.  [default: cuda where there is one]")] = None,
) -> None:
    """Batch norm, add and ReLU against eager PyTorch, torch.compile and timm, once the quick tests have passed."""
    if device not in (None, "cpu", "cuda"):
        raise UserError(f"device must be cpu or cuda, got {device!r}.")
    _benchmark("bench_kernels").main(rounds, quick, save, device)


@app.command()
def surgery(
    everything: Annotated[bool, typer.Option("--all", help="All of torchvision's models and most of timm's.")] = False,
    export: Annotated[bool, typer.Option("--export", help="Export and compile the folded models instead.")] = False,
    speed: Annotated[bool, typer.Option("--speed", help="Time the folded models instead.")] = False,
    compiled: Annotated[bool, typer.Option(help="With --speed: torch.compile too, which takes hours.")] = True,
    only: Annotated[list[str] | None, typer.Option(help="Names or patterns of models, such as 'timm:dla*'.")] = None,
    save: Annotated[
        bool, typer.Option("--save", help="Write benchmarks/results/surgery.csv, surgery_programs.csv or _speed.csv.")
    ] = False,
) -> None:
    """Fold and convert over models of torchvision and timm: what folds, what doesn't and why, and how exact it is."""
    if export and speed:
        raise UserError("--export and --speed are two runs: give one of them.")
    what = "export" if export else "speed" if speed else "fold"
    _benchmark("bench_surgery").main(everything, save, what, only or (), compiled)


@app.command()
def fold(
    rounds: Annotated[int, typer.Option(help="Rounds in which all sides take turns.")] = 11,
    save: Annotated[bool, typer.Option("--save", help="Write benchmarks/results/fold.csv.")] = False,
    compiled: Annotated[bool, typer.Option(help="Also measure torch.compile, which takes most of the time.")] = True,
) -> None:
    """Inference on folded networks against unfolded ones, torch.fx's fuse and torch.compile."""
    _benchmark("bench_fold").main(rounds, save, compiled)


@app.command()
def sync(
    save: Annotated[
        bool, typer.Option("--save", help="Write benchmarks/results/sync.csv and sync_networks.csv.")
    ] = False,
    table: Annotated[bool, typer.Option("--table", help="Print the model's predictions, and measure nothing.")] = False,
) -> None:
    """What synchronized statistics cost on 1 to 4 processes of this machine, beside a model of it."""
    _benchmark("bench_sync").main(save, table)


@app.command()
def population(
    rounds: Annotated[int, typer.Option(help="Rounds in which all tools take turns.")] = 5,
    save: Annotated[bool, typer.Option("--save", help="Write benchmarks/results/population.csv.")] = False,
    batches: Annotated[int, typer.Option(help="Batches of a round.")] = 4,
    networks: Annotated[str, typer.Option(help="Networks, separated by commas, or all.")] = "all",
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    """Recalibration against fvcore and torch on the same model and batches."""
    _benchmark("bench_population").main(rounds, save, batches, networks, threads)


def _benchmark(name: str) -> Any:
    path = Path(__file__).parents[2] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path) if path.exists() else None
    if spec is None or spec.loader is None:
        raise UserError("the benchmarks are not part of an installed bnkit: run this from a clone of its repository.")
    sys.path.insert(0, str(path.parent))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
