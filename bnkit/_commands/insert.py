"""`bnkit insert`."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .._checks import require
from .._weights import load_weights
from ._data import DataDir, Download, ImageSize, SkipCorrupt, load_for_training
from ._models import ModelName, ModelOptions, is_own, load_model
from ._progress import progress
from ._runs import build_model
from ._statistics import BatchSize, Images, Normalize, NumBatches
from ._surgery import SHAPE_HELP, Checkpoint, Json, Tolerance, Where, example_of, finish, run


def insert(
    model: ModelName,
    checkpoint: Checkpoint = None,
    data: Annotated[
        str | None, typer.Option(help="Calibration images: a set's name, or a folder or .zip of class folders.")
    ] = None,
    batches: NumBatches = None,
    batch_size: BatchSize = 128,
    normalize: Normalize = "channel",
    shape: Annotated[str, typer.Option(help=f"{SHAPE_HELP} Where there is no --data.")] = "3,224,224",
    where: Where = None,
    norm: Annotated[str, typer.Option(help="batch, ghost, sync, frozen or renorm.")] = "batch",
    tolerance: Tolerance = None,
    option: ModelOptions = None,
    out: Annotated[Path | None, typer.Option(help="File to write the weights to.")] = None,
    data_dir: DataDir = None,
    download: Download = False,
    image_size: ImageSize = None,
    skip_corrupt: SkipCorrupt = False,
    json: Json = False,
) -> None:
    """Put batch norms into a trained model, outputs unchanged, and report where."""
    from .. import surgery

    require(batch_size >= 1, f"--batch-size must be at least 1, got {batch_size}: 128 is usual.")
    require(batches is None or batches >= 1, f"--batches must be at least 1, got {batches}: leave it out for all.")
    # Of bnkit's models the one without norms is meant, unless -o norm= says otherwise.
    norm_of_model = "none" if is_own(model) else None
    if data is None:
        example, loader, total = example_of(shape), None, 0
        network = load_model(model, [*(["norm=none"] if norm_of_model else []), *(option or [])], checkpoint)
    else:
        images = load_for_training(model, data, data_dir, download, image_size, skip_corrupt, Console(stderr=json))
        network = build_model({"model": model, "norm": norm_of_model, "options": option or []}, images)
        if checkpoint is not None:
            load_weights(network, checkpoint)
        parts = Images(images, "train", normalize, batch_size)
        total = len(parts) if batches is None else min(len(parts), batches)
        loader = itertools.islice(parts, total)
        example = next(loader, None)
        require(example is not None, f"{data} must hold images to calibrate on, got none that can be read: add some.")
        loader = itertools.chain([example], loader)
    with progress(json) as bar:
        result = surgery.insert(
            network,
            None if loader is None else bar.track(loader, total, description="Measuring activations"),
            example=example,
            where=where or None,
            norm=norm,
            tolerance=tolerance,
            inplace=True,
            forward=run,
        )
    finish(result, out, json, example)
