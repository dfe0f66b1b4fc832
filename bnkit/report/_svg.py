"""One SVG file per figure."""

from __future__ import annotations

import os

from .._files import written_aside
from ._model import Panels


def save_svg(panels: Panels, path: str | os.PathLike[str]) -> None:
    """Write a figure as a stand-alone SVG file: all panels side by side on white, text as outlines.

    The same `panels` give the same bytes. The file is complete or absent.

    Raises:
        UserError: `path` can't be written.
    """
    # Imported here because matplotlib takes half a second that no other command should pay.
    from ._render import render_panels

    with written_aside(path) as temporary:
        temporary.write_text(render_panels(panels), encoding="utf-8")
