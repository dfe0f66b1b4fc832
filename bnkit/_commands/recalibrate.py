"""`bnkit recalibrate`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ._data import DataDir, DataName, Download, ImageSize, SkipCorrupt
from ._models import ModelName, ModelOptions
from ._statistics import BatchSize, Checkpoint, Device, Norm, Normalize, NumBatches, Out, SkipNonfinite, run


def recalibrate(
    model: ModelName,
    checkpoint: Checkpoint,
    out: Out,
    data: DataName,
    method: Annotated[str, typer.Option(help="pooled, layerwise, batch or moving.")] = "pooled",
    batches: NumBatches = None,
    batch_size: BatchSize = 128,
    split: Annotated[str, typer.Option(help="Which images: train or test.")] = "train",
    normalize: Normalize = "channel",
    skip_nonfinite: SkipNonfinite = False,
    norm: Norm = None,
    option: ModelOptions = None,
    data_dir: DataDir = None,
    download: Download = False,
    image_size: ImageSize = None,
    skip_corrupt: SkipCorrupt = False,
    device: Device = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the report.")] = False,
) -> None:
    """Measure the running statistics of a trained model anew, on images, and write the weights with them."""
    from .. import population

    def measure(network: Any, images: Any) -> population.Recalibration:
        return population.recalibrate(
            network, images, method, num_batches=batches, skip_nonfinite=skip_nonfinite, progress=not json
        )

    recipe = {"model": model, "norm": norm, "options": option or []}
    source = {
        "name": data,
        "data_dir": data_dir,
        "download": download,
        "image_size": image_size,
        "skip_corrupt": skip_corrupt,
    }
    run(measure, recipe, checkpoint, out, source, split, normalize, batch_size, device, json)
