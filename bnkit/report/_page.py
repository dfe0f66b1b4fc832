"""One self-contained HTML page."""

from __future__ import annotations

import base64
import os
from pathlib import Path
from typing import Any

from .._files import written_aside
from ._alt import describe
from ._model import Page, Panels, Plot, Table
from ._palette import DARK, LIGHT, Theme
from ._words import is_quantity, setting


def save_page(page: Page, path: str | os.PathLike[str]) -> None:
    """Write `page` as one HTML file that needs no network, no script and no other file.

    Every plot is embedded twice, for light and for dark screens. The file is complete or absent.

    Raises:
        UserError: `path` can't be written.
    """
    with written_aside(path) as temporary:
        temporary.write_text(render_page(page), encoding="utf-8", errors="replace")


def render_page(page: Page) -> str:
    """The page as HTML text."""
    # Imported here: neither is needed before there is a page to write, and both would slow down every start.
    import jinja2

    from ._render import PANEL_SIZE

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["setting"] = setting
    width, height = PANEL_SIZE
    return environment.get_template("page.html.j2").render(
        page=page,
        figures=[_figure(panels) for panels in page.figures if panels.plots],
        is_quantity=_is_quantity,
        width=width,
        height=height,
    )


def _figure(panels: Panels) -> dict[str, Any]:
    images = [
        {
            "title": plot.title,
            "note": plot.note,
            "alt": describe(plot),
            "light": _embedded(plot, LIGHT),
            "dark": _embedded(plot, DARK),
        }
        for plot in panels.plots
    ]
    return {"title": panels.title, "caption": panels.caption, "alt": panels.alt, "images": images}


def _embedded(plot: Plot, theme: Theme) -> str:
    from ._render import render_plot

    return "data:image/svg+xml;base64," + base64.b64encode(render_plot(plot, theme).encode()).decode("ascii")


def _is_quantity(table: Table, column: int) -> bool:
    """Whether a column holds quantities, which line up at the right; the first column names the row."""
    return column > 0 and bool(table.rows) and all(is_quantity(row[column]) for row in table.rows)
