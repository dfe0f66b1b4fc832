"""The data sets that commands are given."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress

if TYPE_CHECKING:
    from ..data import ImageSet

DataName = Annotated[str, typer.Option(help="A set's name, or a folder or .zip of class folders of images.")]
DataDir = Annotated[Path | None, typer.Option(help="Where downloaded data sets lie.  [default: data]")]
Download = Annotated[bool, typer.Option("--download", help="Download the data set if it is missing.")]
ImageSize = Annotated[
    int | None, typer.Option(help="Side to resize the images to.  [default: their own; 32 for a folder]")
]
SkipCorrupt = Annotated[bool, typer.Option("--skip-corrupt", help="Leave out images that can't be read.")]


def load_data(
    name: str, data_dir: Path | None, download: bool, image_size: int | None, skip_corrupt: bool, console: Console
) -> ImageSet:
    """The data set called `name`, read under a progress bar; see `bnkit.data.load`."""
    from .. import data

    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading images", total=None)
        images = data.load(
            name,
            data_dir=data_dir,
            download=download,
            size=image_size,
            skip_corrupt=skip_corrupt,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if images.skipped:
        console.print(f"{len(images.skipped)} unreadable images are left out.")
    return images
