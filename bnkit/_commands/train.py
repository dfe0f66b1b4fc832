"""`bnkit train`."""

from __future__ import annotations

import dataclasses
import json as json_module
import math
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from .._checks import require
from .._files import check_writable, write_text
from .._processes import rank, world_size
from .._weights import load_weights, save_weights
from ._data import DataDir, DataName, Download, ImageSize, SkipCorrupt, is_folder, load_for_training
from ._models import MODEL_HELP, ModelOptions
from ._runs import CHECKPOINT, RUN, WEIGHTS, build_model, read_run

if TYPE_CHECKING:
    from torch import nn

    from ..data import ImageSet, Photographs
    from ..train import FitConfig, History

_GRAY_AUGMENTATION, _COLOR_AUGMENTATION, _PHOTOGRAPH_AUGMENTATION = "shift=2", "crop=4,flip", "resized_crop=0.08,flip"
_PHOTOGRAPHS_AT_ONCE = 100


def train(
    context: typer.Context,
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = "resnet20",
    norm: Annotated[str | None, typer.Option(help="The norm of one of bnkit's models.  [default: batch]")] = None,
    option: ModelOptions = None,
    paper: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            help="Model and settings of Ioffe and Szegedy 2015, as defaults of the other options: inception, "
            "bn-baseline, bn-x5, bn-x30 or bn-x5-sigmoid.",
        ),
    ] = None,
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
    schedule: Annotated[str, typer.Option(help="cosine, step, exponential or constant.")] = "cosine",
    decay: Annotated[float, typer.Option(help="Factor that the exponential schedule reaches.")] = 0.01,
    warmup: Annotated[float, typer.Option(help="Part of the steps over which the rate grows.")] = 0.05,
    loss: Annotated[str, typer.Option(help="cross-entropy; or rbf, rbf-discriminative of LeNet-5.")] = "cross-entropy",
    label_smoothing: Annotated[float, typer.Option(help="Probability spread over all classes.")] = 0.0,
    shuffle: Annotated[str, typer.Option(help="all, within-shards or shards, of the training images.")] = "all",
    augment: Annotated[
        str,
        typer.Option(
            help="Such as crop=4,flip, or none.  [auto: crop=4,flip in colour, shift=2 in gray, "
            "resized_crop=0.08,flip for photographs]"
        ),
    ] = "auto",
    ema: Annotated[float, typer.Option(help="Decay of a moving average of the weights; 0 for none.")] = 0.0,
    normalize: Annotated[
        str, typer.Option(help="channel, imagenet or unit.  [auto: imagenet for photographs, else channel]")
    ] = "auto",
    precision: Annotated[
        str, typer.Option(help="32-true, bf16-mixed, 64-true.  [auto: bf16-mixed where it measures faster]")
    ] = "auto",
    contiguous: Annotated[bool, typer.Option("--contiguous", help="Don't use the channels_last layout.")] = False,
    workers: Annotated[int | None, typer.Option(help="Processes that read photographs.  [default: one a core]")] = None,
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
    given = {**context.params, "nesterov": momentum > 0, "color": 0.0}
    if paper is not None:
        given |= _of_paper(paper, context)
    recipe = read_run(resume)["recipe"] if resume is not None else _recipe(given)
    out = resume or out or Path("runs") / time.strftime("train-%Y%m%d-%H%M%S")
    data_dir = None if recipe["data_dir"] is None else Path(recipe["data_dir"])
    size, skip_corrupt = recipe["image_size"], recipe["skip_corrupt"]
    images = load_for_training(recipe["model"], recipe["data"], data_dir, download, size, skip_corrupt, console)
    if is_folder(recipe["data"]):
        recipe["image_size"] = images.shape[1]
    config = _configure(given, images) if resume is None else FitConfig.from_dict(read_run(resume)["config"])
    _run(recipe, images, config, out, resume is not None, console, json)


def _of_paper(name: str, context: typer.Context) -> dict[str, Any]:
    """The options that the recipe called `name` changes, without those that were given by hand."""
    from .. import models
    from ..train import bn_inception_settings

    settings = bn_inception_settings(name, context.params["epochs"])
    of_model = next(recipe for key, recipe in models.BN_INCEPTION_RECIPES.items() if key.lower() == name.lower())
    found = {"model": "bn_inception", "norm": of_model.norm, "warmup": 0.0, **settings}
    free = {key: value for key, value in found.items() if not _is_given(context, key)}
    model = free.get("model", context.params["model"]).removeprefix("bnkit:")
    if ":" in model:  # of another library, whose models have neither our norms nor our options
        return {key: value for key, value in free.items() if key != "norm"}
    own = {"activation": of_model.activation, "dropout": of_model.dropout, "lrn": of_model.lrn}
    known = models.options(model)
    options = [f"{key}={value}" for key, value in own.items() if key in known]
    return {**free, "option": [*options, *(context.params["option"] or ())]}


def _is_given(context: typer.Context, option: str) -> bool:
    source = context.get_parameter_source(option)
    return source is not None and source.name == "COMMANDLINE"


def _recipe(given: dict[str, Any]) -> dict[str, Any]:
    """What model, data and initial weights are, as `run.json` keeps it."""
    return {
        "model": given["model"],
        "norm": given["norm"],
        "options": list(given["option"] or []),
        "data": given["data"],
        "data_dir": None if given["data_dir"] is None else str(given["data_dir"]),
        "image_size": given["image_size"],
        "skip_corrupt": given["skip_corrupt"],
        "weights": None if given["weights"] is None else str(given["weights"]),
    }


def _configure(given: dict[str, Any], images: ImageSet | Photographs) -> FitConfig:
    from .._devices import chosen_device
    from ..data import Photographs
    from ..train import FitConfig, fast_precision

    epochs, batch_size, warmup, evaluations = (
        given[name] for name in ("epochs", "batch_size", "warmup", "evaluations")
    )
    require(0 < epochs < math.inf, f"epochs must be positive and finite, got {epochs}: try 10.")
    require(0 <= warmup <= 1, f"warmup is a part of the steps, from 0 to 1, got {warmup}: try 0.05.")
    require(evaluations >= 1, f"evaluations must be 1 or more, got {evaluations}: try 10.")
    require(
        1 <= batch_size <= len(images.train_labels),
        f"batch_size must be from 1 to the {len(images.train_labels)} training images, got {batch_size}: change it.",
    )
    names = {field.name for field in dataclasses.fields(FitConfig)}
    settings = {name: value for name, value in given.items() if name in names}
    streamed = isinstance(images, Photographs)
    if settings["augment"] == "auto":
        settings["augment"] = _augmentation(images, given["color"])
    if settings["normalize"] == "auto":
        settings["normalize"] = "imagenet" if streamed else "channel"
    if streamed:
        settings["eval_batch_size"] = _PHOTOGRAPHS_AT_ONCE
    device = chosen_device(settings["device"])
    if settings["precision"] == "auto":
        settings["precision"] = fast_precision(device)
    steps = max(1, round(epochs * (len(images.train_labels) // batch_size)))
    return FitConfig(
        steps=steps,
        warmup_steps=round(warmup * steps),
        eval_every=max(1, -(-steps // evaluations)),
        devices=world_size(),
        channels_last=not given["contiguous"],
        **settings,
    )


def _augmentation(images: ImageSet | Photographs, color: float) -> str:
    from ..data import Photographs

    if images.shape[0] == 1:
        return _GRAY_AUGMENTATION
    text = _PHOTOGRAPH_AUGMENTATION if isinstance(images, Photographs) else _COLOR_AUGMENTATION
    return f"{text},color={color:g}" if color else text


def _run(
    recipe: dict[str, Any],
    images: ImageSet | Photographs,
    config: FitConfig,
    out: Path,
    resume: bool,
    console: Console,
    as_json: bool,
) -> None:
    import torch

    from ..report import LiveProgress, print_page
    from ..train import load_evaluated

    first = rank() == 0
    if first:
        check_writable(out)
    torch.manual_seed(config.seed)
    model = build_model(recipe, images)
    checkpoint = out / CHECKPOINT
    saved = checkpoint if resume and checkpoint.exists() else None
    if recipe["weights"] is not None and saved is None:
        load_weights(model, recipe["weights"])
    # What repeats a run is what began it, also after a resume.
    command = (read_run(out) if resume else {}).get("command") or shlex.join(["bnkit", *sys.argv[1:]])
    run = {"recipe": recipe, "config": config.to_dict(), "command": command}
    if first and not resume:
        write_text(out / RUN, json_module.dumps(run, indent=2) + "\n")
    with LiveProgress(console if first else Console(quiet=True)).shown() as progress:
        history, partial = _fit(model, images, config, checkpoint, saved, progress)
    if not first:
        return
    if partial is not None:
        load_evaluated(checkpoint, model)
    save_weights(model, out / WEIGHTS)
    page = _save(run, history, images, out, partial)
    if as_json:
        print((out / RUN).read_text(encoding="utf-8"), end="")
    else:
        print_page(page, console)
        console.print(f"Files: {out}/{WEIGHTS}, {CHECKPOINT}, {RUN}, metrics.csv and report.html.")


def _fit(
    model: nn.Module,
    images: ImageSet | Photographs,
    config: FitConfig,
    checkpoint: Path,
    saved: Path | None,
    progress: Any,
) -> tuple[History, str | None]:
    """Train; what came of it, and why it ended early, if it did."""
    from ..train import History, iterate

    history = History(config)
    progress.phase("training", config.steps)
    try:
        for evaluation in iterate(model, images, config, checkpoint=checkpoint, resume=saved):
            history.evaluations.append(evaluation)
            progress.update(evaluation.step, {"test": evaluation.test_accuracy})
    except KeyboardInterrupt:
        if not history.evaluations:
            raise
        return history, f"interrupted after step {history.final.step:,} of {config.steps:,}"
    return history, None


def _save(run: dict[str, Any], history: History, images: ImageSet | Photographs, out: Path, partial: str | None) -> Any:
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
