"""What `recalibrate` and `adapt` share: a model, a checkpoint and images in; a checkpoint and a report out."""

from __future__ import annotations

import json as json_module
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from .._checks import require, unknown
from .._devices import chosen_device
from .._processes import rank, world_size
from .._weights import load_weights, save_weights
from ._data import load_for_training
from ._runs import build_model

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from ..data import ImageSet, Photographs
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
    """This process's share of a split, in normalized batches; can be gone through again and again."""

    def __init__(self, images: ImageSet | Photographs, split: str, normalize: str, batch_size: int) -> None:
        self._parts = _parts(images, split, batch_size)
        self._mean, self._std = (255 * moment.view(1, -1, 1, 1) for moment in _moments(images, normalize))

    def __len__(self) -> int:
        return len(self._parts)

    def __iter__(self) -> Iterator[Tensor]:
        for part in self._parts:
            yield (part.float() - self._mean) / self._std


class Decoded:
    """This process's share of a split of photographs, in batches of bytes, decoded by processes of their own."""

    def __init__(self, photographs: Photographs, split: str, batch_size: int) -> None:
        train = split == "train"
        self._examples = photographs.calibration_examples() if train else photographs.test_examples()
        self._skip_corrupt = photographs.skip_corrupt
        parts = _mixed(len(self._examples)).split(batch_size)[rank() :: world_size()]
        self._keys = [[(i, 0) for i in part.tolist()] for part in parts]

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[Tensor]:
        from torch.utils.data import DataLoader

        from ..data import collated, usual_workers

        loader: Any = DataLoader(
            self._examples,
            batch_sampler=self._keys,  # pyright: ignore[reportArgumentType]
            num_workers=usual_workers(world_size()),
            collate_fn=collated,
        )
        for images, _, fault in loader:
            require(
                not fault or self._skip_corrupt,
                f"{fault}: replace or remove it, or leave such files out with --skip-corrupt.",
            )
            if len(images):
                yield images


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
    chosen = chosen_device(device, ("cuda", "cpu"))
    first = rank() == 0
    if first:
        require(not out.is_dir(), f"--out must be a file, got the folder {out}: name a file in it.")
        check_writable(out.parent)
    console = Console(stderr=as_json, quiet=not first)
    images = load_for_training(recipe["model"], **source, console=console, labels=False)
    model = build_model(recipe, images)
    load_weights(model, checkpoint)
    batches = Images(images, split, normalize, batch_size)
    with _processes(chosen) as where:
        model.to(where)
        result = measure(model, batches)
    if first:
        save_weights(model.cpu(), out)
        _show(result, out, as_json, console)


def _parts(images: ImageSet | Photographs, split: str, batch_size: int) -> Decoded | tuple[Tensor, ...]:
    """This process's share of the split, in batches of bytes."""
    from ..data import Photographs

    if isinstance(images, Photographs):
        return Decoded(images, split, batch_size)
    pixels = images.train_images if split == "train" else images.test_images
    return pixels[_mixed(len(pixels))].split(batch_size)[rank() :: world_size()]


def _mixed(count: int) -> Tensor:
    """An order in which each batch has images of all classes, where folders are read class by class; always the same.

    Statistics of a batch, and so what later layers see of it, would else be those of a single class.
    """
    import torch

    return torch.randperm(count, generator=torch.Generator().manual_seed(0))


def _moments(images: ImageSet | Photographs, normalize: str) -> tuple[Tensor, Tensor]:
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


@contextmanager
def _processes(device: torch.device) -> Iterator[torch.device]:
    """This process's device; the others that torchrun started join in."""
    import torch
    import torch.distributed as dist

    if world_size() == 1:
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)  # the one that NCCL sends objects from
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def _show(result: Recalibration, out: Path, as_json: bool, console: Console) -> None:
    if not as_json:
        console.print(f"{result}\nWrote {out}.", markup=False, highlight=False, soft_wrap=True)
        return
    layers = {
        name: {key: json_number(getattr(drift, key)) for key in ("mean_shift", "var_ratio", "distance")}
        for name, drift in result.layers.items()
    }
    facts = {name: getattr(result, name) for name in ("method", "batches", "short", "skipped", "not_run", "nonfinite")}
    print(json_module.dumps({**facts, "layers": layers, "out": str(out)}, indent=2, allow_nan=False))


def json_number(value: float) -> float | None:
    """JSON has no NaN and no infinity: None stands for them."""
    return value if math.isfinite(value) else None
