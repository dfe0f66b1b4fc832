"""Plots to SVG text with matplotlib."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from ._heatmap import draw_heatmap
from ._lines import draw_lines
from ._model import HeatMap, Panels, Plot
from ._palette import LIGHT, Theme
from ._words import printable

PANEL_SIZE = (350, 265)  # in points; its text of 10.5 points stays readable where a phone shows this many pixels
_POINTS_PER_INCH = 72
_TITLE_CHARACTERS = 42
_NOTE_CHARACTERS = 62
_PATH = re.compile(r'(?<= d=")[^"]+')
_LONG_DECIMAL = re.compile(r"-?\d+\.\d{3,}")


def render_plot(plot: Plot, theme: Theme) -> str:
    """One panel on a transparent ground, without its title and note: the page sets those as text."""
    with _style(theme):
        figure = _figure(1, 1, padding=0.03)
        _draw(figure.subplots(), plot, theme)
        return _svg(figure, plot.title)


def render_panels(panels: Panels) -> str:
    """All panels of a figure side by side on white, with titles and notes."""
    titles = _blocks([plot.title for plot in panels.plots], _TITLE_CHARACTERS)
    notes = _blocks([plot.note for plot in panels.plots], _NOTE_CHARACTERS)
    count = max(len(panels.plots), 1)
    words = 30 + 15 * _lines(titles) + 12 * _lines(notes) + 22 * (count > 1)
    with _style(LIGHT):
        figure = _figure(count, 1 + words / PANEL_SIZE[1], padding=0.1)
        figure.patch.set_facecolor(LIGHT.background)
        if count > 1:
            figure.suptitle(printable(panels.title), fontsize=14, fontweight="bold")
        parts = figure.subfigures(1, count, squeeze=False)[0]
        for part, plot, title, note in zip(parts, panels.plots, titles, notes, strict=False):
            part.suptitle(title, x=0.03, ha="left", fontsize=12, fontweight="bold")
            if note:
                part.supxlabel(note, x=0.03, ha="left", fontsize=9.5, color=LIGHT.faint)
            _draw(part.subplots(), plot, LIGHT)
        return _svg(figure, panels.title)


def _blocks(texts: Sequence[str], width: int) -> list[str]:
    """Each text broken into lines, and all made equally many lines, so that the plots beside each other stand level."""
    broken = [textwrap.wrap(printable(text), width) for text in texts]
    height = max(map(len, broken), default=0)
    return ["\n".join(lines + [" "] * (height - len(lines))) for lines in broken]


def _lines(blocks: Sequence[str]) -> int:
    return max((len(block.split("\n")) for block in blocks if block), default=0)


def _draw(axes: Axes, plot: Plot, theme: Theme) -> None:
    if isinstance(plot, HeatMap):
        draw_heatmap(axes, plot, theme)
    else:
        draw_lines(axes, plot, theme)


def _figure(columns: int, height: float, padding: float) -> Figure:
    size = (columns * PANEL_SIZE[0] / _POINTS_PER_INCH, height * PANEL_SIZE[1] / _POINTS_PER_INCH)
    layout = ConstrainedLayoutEngine(w_pad=padding, h_pad=padding)
    figure = Figure(figsize=size, dpi=_POINTS_PER_INCH, layout=layout)
    figure.patch.set_facecolor("none")
    return figure


def _svg(figure: Figure, title: str) -> str:
    """The figure as SVG, the same on every run; paths keep a hundredth of a point, which nobody can see."""
    stream = io.StringIO()
    unsigned: dict[str, Any] = dict.fromkeys(("Date", "Creator", "Type", "Format"))
    figure.savefig(stream, format="svg", metadata={"Title": printable(title), **unsigned})
    return _PATH.sub(lambda path: _LONG_DECIMAL.sub(_rounded, path[0]), stream.getvalue())


def _rounded(number: re.Match[str]) -> str:
    return f"{float(number[0]):.2f}".rstrip("0").rstrip(".")


def _style(theme: Theme) -> AbstractContextManager[None]:
    """A context with our own settings on top of matplotlib's defaults, whatever the user's are."""
    defaults = {key: value for key, value in matplotlib.rcParamsDefault.items() if not key.startswith("backend")}
    settings: dict[Any, Any] = defaults | {
        "axes.edgecolor": theme.faint,
        "axes.facecolor": "none",
        "axes.labelcolor": theme.ink,
        "axes.linewidth": 0.8,
        "axes.labelsize": 11,
        "axes.spines.left": False,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "font.family": ["DejaVu Sans"],
        "font.size": 10.5,
        "grid.color": theme.grid,
        "grid.linewidth": 0.8,
        "axes.axisbelow": True,
        "hatch.linewidth": 0.8,
        "legend.borderaxespad": 0.4,
        "legend.borderpad": 0.2,
        "legend.columnspacing": 1.4,
        "legend.fontsize": 10.5,
        "legend.frameon": False,
        "legend.handlelength": 1.8,
        "legend.labelcolor": theme.ink,
        "lines.linewidth": 1.8,
        "lines.solid_capstyle": "round",
        "svg.fonttype": "path",
        "svg.hashsalt": "bnkit",
        "text.color": theme.ink,
        "text.parse_math": False,
        "xtick.color": theme.faint,
        "xtick.labelcolor": theme.ink,
        "xtick.labelsize": 10.5,
        "ytick.color": theme.faint,
        "ytick.labelcolor": theme.ink,
        "ytick.labelsize": 10.5,
        "ytick.major.size": 0,
        "ytick.minor.size": 0,
    }
    return matplotlib.rc_context(settings)
