"""`bnkit evaluate`."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from .._checks import require
from .._weights import load_weights
from ._data import DataDir, Download, ImageSize, SkipCorrupt, load_for_training
from ._models import MODEL_HELP, ModelOptions
from ._progress import progress
from ._runs import WEIGHTS, build_model, read_run
from ._statistics import json_number

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from ..data import ImageSet, Photographs

_PHOTOGRAPHS_AT_ONCE = 100


def evaluate(
    checkpoints: Annotated[list[Path], typer.Argument(help="Folders of `bnkit train`, or weights of --model.")],
    model: Annotated[str | None, typer.Option(help=f"{MODEL_HELP} Needed for files of weights.")] = None,
    norm: Annotated[str | None, typer.Option(help="The norm of one of bnkit's models.  [default: batch]")] = None,
    option: ModelOptions = None,
    data: Annotated[str | None, typer.Option(help="As in `bnkit train`.  [default: the first run's]")] = None,
    data_dir: DataDir = None,
    download: Download = False,
    image_size: ImageSize = None,
    skip_corrupt: SkipCorrupt = False,
    normalize: Annotated[str, typer.Option(help="channel, imagenet or unit, for files of weights.")] = "channel",
    batch_size: Annotated[int, typer.Option(help="Images a forward pass.")] = 500,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")] = False,
) -> None:
    """Test accuracy and loss of trained models, and of their ensemble: the mean of their probabilities."""
    from ..data import Photographs

    console = Console(stderr=json)
    given = {
        "recipe": {"model": model, "norm": norm, "options": option or []},
        "config": {"steps": 1, "normalize": normalize},
    }
    runs = [_run_of(path, given) for path in checkpoints]
    recipe = runs[0]["recipe"]
    data = data or recipe.get("data")
    require(data is not None, "files of weights don't say what they were trained on: add --data.")
    assert data is not None
    size = recipe.get("image_size") if image_size is None else image_size
    folder = data_dir or recipe.get("data_dir")
    images = load_for_training(recipe["model"], data, folder, download, size, skip_corrupt, console)
    if isinstance(images, Photographs):
        batch_size = min(batch_size, _PHOTOGRAPHS_AT_ONCE)
    changes = {"eval_batch_size": batch_size, "device": device}
    with progress(json) as bar:
        task = bar.add_task("Evaluating", total=len(checkpoints) * len(images.test_labels))
        found = [
            _probabilities(path, run, images, changes, lambda count: bar.advance(task, count))
            for path, run in zip(checkpoints, runs, strict=True)
        ]
    labels = found[0][1]  # of all: the same images are read, or left out, for each
    members = [probabilities for probabilities, _ in found]
    rows = [_row(str(path), member, labels) for path, member in zip(checkpoints, members, strict=True)]
    if len(members) > 1:
        rows.append(_row("ensemble", sum(members[1:], members[0]) / len(members), labels))
    _show(rows, data, len(labels), console, json)


def _run_of(path: Path, given: dict[str, Any]) -> dict[str, Any]:
    if path.is_dir():
        return read_run(path)
    require(path.exists(), f"there is no run or file {path}: name one that exists.")
    require(given["recipe"]["model"] is not None, f"{path} does not say of which model it is: add --model.")
    return given


def _probabilities(
    path: Path,
    run: dict[str, Any],
    images: ImageSet | Photographs,
    changes: dict[str, Any],
    progress: Callable[[int], None],
) -> tuple[Tensor, Tensor]:
    from ..train import FitConfig, labelled_probabilities

    model = build_model(run["recipe"], images)
    load_weights(model, path / WEIGHTS if path.is_dir() else path)
    config = FitConfig.from_dict({**run["config"], "devices": 1, **changes})
    return labelled_probabilities(model, images, config, progress)


def _row(name: str, probabilities: Tensor, labels: Tensor) -> dict[str, Any]:
    chosen = probabilities.gather(1, labels[:, None])
    return {
        "name": name,
        "accuracy": (probabilities.argmax(1) == labels).double().mean().item(),
        "loss": -chosen.double().clamp_min(1e-45).log().mean().item(),
    }


def _show(rows: list[dict[str, Any]], data: str, count: int, console: Console, as_json: bool) -> None:
    from ..report import Table, print_table

    if as_json:
        rows = [{**row, "loss": json_number(row["loss"])} for row in rows]
        print(json_module.dumps({"data": data, "images": count, "results": rows}, indent=2, allow_nan=False))
        return
    cells = [[row["name"], f"{row['accuracy']:.2%}", f"{row['loss']:.4f}"] for row in rows]
    print_table(Table(f"{count:,} test images of {data}", ["model", "accuracy", "loss"], cells), console)
