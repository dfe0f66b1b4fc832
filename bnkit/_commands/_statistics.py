"""What `recalibrate` and `adapt` share: a model, a checkpoint and images in; a checkpoint and a report out."""

from __future__ import annotations

import json as json_module
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from .._checks import require, unknown
from .._processes import rank, world_size
from .._weights import load_weights, save_weights
from ._data import load_data
from ._runs import build_model

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..data import ImageSet
    from ..population import Recalibration

Checkpoint = Annotated[Path, typer.Argument(help="The weights: safetensors, or torch.save data.")]
Out = Annotated[Path, typer.Option(help="File to write; .safetensors or else by torch.save.")]
Norm = Annotated[str | None, typer.Option(help="The norm of one of bnkit's models.  [default: batch]")]
Normalize = Annotated[str, typer.Option(help="channel (by this set's own mean and std), imagenet or unit.")]
BatchSize = Annotated[int, typer.Option(help="Images a batch.")]
NumBatches = Annotated[int | None, typer.Option("--batches", help="How many batches to use.  [default: all]")]
SkipNonfinite = Annotated[bool, typer.Option("--skip-nonfinite", help="Leave out batches with NaN or infinity.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]

Measure = Callable[["nn.Module", "Images"], "Recalibration"]


class Images:
    """This process's share of an image set, in normalized batches; can be gone through again and again."""

    def __init__(self, images: Tensor, mean: Tensor, std: Tensor, batch_size: int) -> None:
        self._parts = images.split(batch_size)[rank() :: world_size()]
        self._mean, self._std = (255 * moment.view(1, -1, 1, 1) for moment in (mean, std))

    def __len__(self) -> int:
        return len(self._parts)

    def __iter__(self) -> Iterator[Tensor]:
        for part in self._parts:
            yield (part.float() - self._mean) / self._std


def run(
    measure: Measure,
    recipe: dict[str, Any],
    checkpoint: Path,
    out: Path,
    source: dict[str, Any],
    split: str,
    normalize: str,
    batch_size: int,
    device: str,
    as_json: bool,
) -> None:
    """Load model and images, measure, write the checkpoint and print the report (rank 0 only)."""
    from .._files import check_writable

    require(split in ("train", "test"), f"--split must be train or test, got {split}.")
    require(batch_size >= 1, f"--batch-size must be at least 1, got {batch_size}: 128 is usual.")
    first = rank() == 0
    if first:
        check_writable(out.parent)
    console = Console(stderr=as_json, quiet=not first)
    images = load_data(**source, console=console)
    model = build_model(recipe, images)
    load_weights(model, checkpoint)
    pixels = images.train_images if split == "train" else images.test_images
    with _processes(_chosen(device)) as where:
        model.to(where)
        result = measure(model, Images(pixels, *_moments(images, normalize), batch_size))
    if first:
        save_weights(model.cpu(), out)
        _show(result, out, as_json, console)


def _moments(images: ImageSet, normalize: str) -> tuple[Tensor, Tensor]:
    import torch

    from ..data import IMAGENET_MEAN, IMAGENET_STD

    fixed = {"imagenet": (IMAGENET_MEAN, IMAGENET_STD), "unit": ((0.0,), (1.0,))}
    if normalize == "channel":
        return images.mean, torch.where(images.std > 0, images.std, 1.0)
    if normalize not in fixed:
        raise unknown("normalization", normalize, ("channel", *fixed))
    mean, std = fixed[normalize]
    require(normalize == "unit" or images.shape[0] == 3, f"--normalize {normalize} is for 3 channels: use channel.")
    return torch.tensor(mean), torch.tensor(std)


def _chosen(device: str) -> str:
    import torch

    require(device in ("auto", "cpu", "cuda"), f"--device must be auto, cpu or cuda, got {device}.")
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


@contextmanager
def _processes(device: str) -> Iterator[str]:
    """This process's device; the others that torchrun started join in."""
    import torch.distributed as dist

    if world_size() == 1:
        yield device
        return
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" else device
    finally:
        dist.destroy_process_group()


def _show(result: Recalibration, out: Path, as_json: bool, console: Console) -> None:
    if not as_json:
        console.print(f"{result}\nWrote {out}.", markup=False, highlight=False, soft_wrap=True)
        return
    layers = {
        name: {"mean_shift": drift.mean_shift, "var_ratio": drift.var_ratio, "distance": drift.distance}
        for name, drift in result.layers.items()
    }
    facts = {name: getattr(result, name) for name in ("method", "batches", "short", "skipped", "not_run", "nonfinite")}
    print(json_module.dumps({**facts, "layers": layers, "out": str(out)}, indent=2))
