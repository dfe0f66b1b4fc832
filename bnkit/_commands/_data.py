"""The data sets that commands are given."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

if TYPE_CHECKING:
    from ..data import ImageSet, Photographs

_LARGEST_IN_MEMORY = 64

DataName = Annotated[str, typer.Option(help="A set's name, or a folder or .zip of class folders of images.")]
DataDir = Annotated[Path | None, typer.Option(help="Where downloaded data sets lie.  [default: data]")]
Download = Annotated[bool, typer.Option("--download", help="Download the data set if it is missing.")]
ImageSize = Annotated[
    int | None, typer.Option(help="Side to resize the images to.  [default: their own; for a folder the model's or 32]")
]
SkipCorrupt = Annotated[bool, typer.Option("--skip-corrupt", help="Leave out images that can't be read.")]


def load_for_training(
    model: str,
    name: str,
    data_dir: Path | None,
    download: bool,
    image_size: int | None,
    skip_corrupt: bool,
    console: Console,
    *,
    labels: bool = True,
) -> ImageSet | Photographs:
    """The data set called `name`, read under a progress bar; see `bnkit.data.load`.

    Images of folders and archives that are to be larger than 64 pixels stay in their files, and are not read. Without
    `image_size` photographs get the size that the model is made for. Without `labels` they may be in no class folders.
    """
    from .. import data

    if is_folder(name):
        size = _side_for(model, name) if image_size is None else image_size
        if size > _LARGEST_IN_MEMORY:
            return data.photographs(name, size, skip_corrupt=skip_corrupt, labels=labels)
        image_size = size
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading images", total=None)
        images = data.load(
            name,
            data_dir=data_dir,
            download=download,
            size=image_size,
            skip_corrupt=skip_corrupt,
            labels=labels,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if images.skipped:
        console.print(f"{len(images.skipped)} unreadable images are left out.")
    return images


def is_folder(name: str) -> bool:
    """Whether `name` is a folder or an archive, not a set that has a name."""
    from .. import data

    return name not in data.names() and Path(name).expanduser().exists()


def _side_for(model: str, name: str) -> int:
    """The model's own side, 224 where that is unknown; or 32, where it is small or where most images are."""
    from .. import data, models

    library, _, model_name = model.rpartition(":")
    own: Any = models.options(model_name)["image_size"] if library in ("", "bnkit") else 224
    return own if own > _LARGEST_IN_MEMORY and data.usual_side(name) >= own // 2 else 32
