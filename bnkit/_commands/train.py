"""`bnkit train`."""

from __future__ import annotations

import json as json_module
import os
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from .._checks import require
from .._files import check_writable, write_text
from .._weights import load_weights, save_weights
from ._data import DataDir, DataName, Download, ImageSize, SkipCorrupt, load_data
from ._models import MODEL_HELP, ModelOptions
from ._runs import CHECKPOINT, RUN, WEIGHTS, build_model, read_run

if TYPE_CHECKING:
    from torch import nn

    from ..data import ImageSet
    from ..train import FitConfig, History

_GRAY_AUGMENTATION, _COLOR_AUGMENTATION = "shift=2", "crop=4,flip"


def train(
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = "resnet20",
    norm: Annotated[str | None, typer.Option(help="The norm of one of bnkit's models.  [default: batch]")] = None,
    option: ModelOptions = None,
    data: DataName = "digits",
    data_dir: DataDir = None,
    download: Download = False,
    image_size: ImageSize = None,
    skip_corrupt: SkipCorrupt = False,
    epochs: Annotated[float, typer.Option(help="Passes over the training images.")] = 10,
    batch_size: Annotated[int, typer.Option(help="Images a step.")] = 128,
    lr: Annotated[float, typer.Option(help="Learning rate after the warm-up.")] = 0.1,
    momentum: Annotated[float, typer.Option(help="Nesterov's, of SGD.")] = 0.9,
    weight_decay: Annotated[float, typer.Option(help="Of weights; norms and biases are spared.")] = 5e-4,
    schedule: Annotated[str, typer.Option(help="cosine, step or constant.")] = "cosine",
    warmup: Annotated[float, typer.Option(help="Part of the steps over which the rate grows.")] = 0.05,
    label_smoothing: Annotated[float, typer.Option(help="Probability spread over all classes.")] = 0.0,
    augment: Annotated[
        str, typer.Option(help="Such as crop=4,flip, or none.  [auto: crop=4,flip in colour, shift=2 in gray]")
    ] = "auto",
    ema: Annotated[float, typer.Option(help="Decay of a moving average of the weights; 0 for none.")] = 0.0,
    normalize: Annotated[str, typer.Option(help="channel, imagenet or unit.")] = "channel",
    precision: Annotated[
        str, typer.Option(help="32-true, bf16-mixed, 64-true.  [auto: bf16-mixed where it measures faster]")
    ] = "auto",
    contiguous: Annotated[bool, typer.Option("--contiguous", help="Don't use the channels_last layout.")] = False,
    evaluations: Annotated[int, typer.Option(help="Evaluations on the test images.")] = 10,
    seed: Annotated[int, typer.Option(help="Decides initial weights, order of batches and augmentation.")] = 0,
    weights: Annotated[Path | None, typer.Option(help="A checkpoint to start from.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    resume: Annotated[
        Path | None, typer.Option(help="A run's folder to go on with; every option but --json is then its own.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Output folder.  [default: runs/train-TIME]")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print run.json instead of tables.")] = False,
) -> None:
    """Train a model on labelled images; start it with torchrun for several processes."""
    from ..train import FitConfig

    console = Console(stderr=json)
    if resume is not None:
        recipe = read_run(resume)["recipe"]
        out = resume
    else:
        recipe = {
            "model": model,
            "norm": norm,
            "options": option or [],
            "data": data,
            "data_dir": None if data_dir is None else str(data_dir),
            "image_size": image_size,
            "skip_corrupt": skip_corrupt,
            "weights": None if weights is None else str(weights),
        }
    out = out or Path("runs") / time.strftime("train-%Y%m%d-%H%M%S")
    data_dir = None if recipe["data_dir"] is None else Path(recipe["data_dir"])
    images = load_data(recipe["data"], data_dir, download, recipe["image_size"], recipe["skip_corrupt"], console)
    settings = {
        "batch_size": batch_size,
        "lr": lr,
        "momentum": momentum,
        "nesterov": momentum > 0,
        "weight_decay": weight_decay,
        "schedule": schedule,
        "label_smoothing": label_smoothing,
        "augment": augment,
        "ema": ema,
        "normalize": normalize,
        "precision": precision,
        "channels_last": not contiguous,
        "seed": seed,
        "device": device,
    }
    config = (
        _configure(settings, images, epochs, warmup, evaluations)
        if resume is None
        else FitConfig.from_dict(read_run(resume)["config"])
    )
    _run(recipe, images, config, out, resume is not None, console, json)


def _configure(settings: dict[str, Any], images: ImageSet, epochs: float, warmup: float, evaluations: int) -> FitConfig:
    import torch

    from ..train import FitConfig, fast_precision

    require(epochs > 0, f"epochs must be positive, got {epochs}: try 10.")
    require(0 <= warmup <= 1, f"warmup is a part of the steps, from 0 to 1, got {warmup}: try 0.05.")
    require(evaluations >= 1, f"evaluations must be 1 or more, got {evaluations}: try 10.")
    batch_size = settings["batch_size"]
    require(
        1 <= batch_size <= len(images.train_labels),
        f"batch_size must be from 1 to the {len(images.train_labels)} training images, got {batch_size}: change it.",
    )
    steps = max(1, round(epochs * (len(images.train_labels) // batch_size)))
    if settings["augment"] == "auto":
        settings["augment"] = _GRAY_AUGMENTATION if images.shape[0] == 1 else _COLOR_AUGMENTATION
    if settings["precision"] == "auto":
        on_gpu = settings["device"] in ("auto", "cuda") and torch.cuda.is_available()
        settings["precision"] = fast_precision(torch.device("cuda" if on_gpu else "cpu"))
    return FitConfig(
        steps=steps,
        warmup_steps=round(warmup * steps),
        eval_every=max(1, -(-steps // evaluations)),
        devices=int(os.environ.get("WORLD_SIZE", "1")),
        **settings,
    )


def _run(
    recipe: dict[str, Any],
    images: ImageSet,
    config: FitConfig,
    out: Path,
    resume: bool,
    console: Console,
    as_json: bool,
) -> None:
    import torch

    from ..report import LiveProgress, print_page

    first = int(os.environ.get("RANK", "0")) == 0
    if first:
        check_writable(out)
    torch.manual_seed(config.seed)
    model = build_model(recipe, images)
    if recipe["weights"] is not None and not resume:
        load_weights(model, recipe["weights"])
    run = {"recipe": recipe, "config": config.to_dict(), "command": shlex.join(["bnkit", *sys.argv[1:]])}
    if first and not resume:
        write_text(out / RUN, json_module.dumps(run, indent=2) + "\n")
    with LiveProgress(console if first else Console(quiet=True)).shown() as progress:
        history, partial = _fit(model, images, config, out / CHECKPOINT, resume, progress)
    if not first:
        return
    save_weights(model, out / WEIGHTS)
    page = _save(run, history, images, out, partial)
    if as_json:
        print((out / RUN).read_text(encoding="utf-8"), end="")
    else:
        print_page(page, console)
        console.print(f"Files: {out}/{WEIGHTS}, {CHECKPOINT}, {RUN}, metrics.csv and report.html.")


def _fit(
    model: nn.Module, images: ImageSet, config: FitConfig, checkpoint: Path, resume: bool, progress: Any
) -> tuple[History, str | None]:
    """Train; what came of it, and why it ended early, if it did."""
    from ..train import History, iterate

    history = History(config)
    progress.phase("training", config.steps)
    try:
        for evaluation in iterate(
            model, images, config, checkpoint=checkpoint, resume=checkpoint if resume and checkpoint.exists() else None
        ):
            history.evaluations.append(evaluation)
            progress.update(evaluation.step, {"test": evaluation.test_accuracy})
    except KeyboardInterrupt:
        if not history.evaluations:
            raise
        return history, f"interrupted after step {history.final.step:,} of {config.steps:,}"
    return history, None


def _save(run: dict[str, Any], history: History, images: ImageSet, out: Path, partial: str | None) -> Any:
    """Write the run's outcome beside its weights; the page that shows it."""
    from .._environment import describe_machine
    from ..report import save_page, save_svg
    from ._training_page import csv_of, page_of

    environment = describe_machine()
    final = history.final
    outcome = {
        "steps": final.step,
        "seconds": round(final.seconds, 2),
        "images_per_second": round(final.step * history.config.batch_size / max(final.seconds, 1e-9), 1),
        "test_accuracy": final.test_accuracy,
        "best_test_accuracy": history.best.test_accuracy,
        "classes": list(images.classes),
    }
    run = {**run, "environment": environment, "partial": partial, "outcome": outcome}
    page = page_of(run, history)
    write_text(out / RUN, json_module.dumps(run, indent=2) + "\n")
    write_text(out / "metrics.csv", csv_of(history))
    for figure in page.figures:
        save_svg(figure, out / f"{figure.name}.svg")
    save_page(page, out / "report.html")
    return page
