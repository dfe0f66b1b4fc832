"""A `HeatMap` on matplotlib axes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize
from matplotlib.patches import Patch, Rectangle
from matplotlib.patheffects import withStroke

from ._axes import PlainFormatter, say_no_data, set_labels
from ._model import HeatMap
from ._palette import Theme
from ._words import number, printable, shortened

_WIDTH = 285  # of the axes, in points, roughly
_DIGIT_WIDTH = 0.62  # of the font size
_FONT_SIZES = (10.5, 9.5, 8.5)
_LONGEST_NAME = 16
_MOST_ROWS = 18  # whose names fit under each other


def draw_heatmap(axes: Axes, plot: HeatMap, theme: Theme) -> None:
    """Draw the cells with their values, the names of rows and columns, and a key for hatching and outline."""
    _set_axes(axes, plot)
    if not (plot.xticks and plot.yticks):
        say_no_data(axes, theme)
        return
    ramp = LinearSegmentedColormap.from_list("ramp", theme.ramp)
    style = _number_style(plot)
    for row, values in enumerate(plot.values):
        for column, value in enumerate(values):
            _draw_cell(axes, plot, theme, ramp, style, (row, column), value)
    if style is None:
        _draw_scale(axes, plot, ramp)
    elif plot.percent:
        axes.text(1, 1.02, "percent", transform=axes.transAxes, ha="right", va="bottom", color=theme.faint)
    _draw_key(axes, plot, theme)


def _set_axes(axes: Axes, plot: HeatMap) -> None:
    xnames = [shortened(printable(tick), _LONGEST_NAME) for tick in plot.xticks]
    ynames = [shortened(printable(tick), _LONGEST_NAME) for tick in plot.yticks]
    width = sum(len(name) + 1 for name in xnames) * _DIGIT_WIDTH * _FONT_SIZES[0]
    columns, rows = _every(xnames, width / _WIDTH), _every(ynames, len(ynames) / _MOST_ROWS)
    axes.set_xticks(columns, [xnames[i] for i in columns])
    axes.set_yticks(rows, [ynames[i] for i in rows])
    axes.set_xlim(-0.5, max(len(plot.xticks), 1) - 0.5)
    axes.set_ylim(-0.5, max(len(plot.yticks), 1) - 0.5)
    set_labels(axes, plot.xlabel, plot.ylabel)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _every(names: Sequence[str], crowding: float) -> range:
    """Positions of the names to write when all of them take `crowding` times the room there is."""
    return range(0, len(names), max(math.ceil(crowding), 1))


def _draw_cell(
    axes: Axes,
    plot: HeatMap,
    theme: Theme,
    ramp: Colormap,
    style: tuple[int, float] | None,
    place: tuple[int, int],
    value: float | None,
) -> None:
    row, column = place
    gap = {"edgecolor": theme.background, "linewidth": 1.5}
    if value is None or not math.isfinite(value):
        axes.add_patch(_failed(row, column, theme))
        axes.add_patch(_cell(row, column, facecolor="none", **gap))
        return
    color = ramp((value - plot.low) / ((plot.high - plot.low) or 1.0))
    axes.add_patch(_cell(row, column, facecolor=color, **gap))
    if style is not None:
        decimals, size = style
        text = _cell_text(value, plot.percent, decimals)
        axes.text(column, row, text, ha="center", va="center_baseline", fontsize=size, color=_ink_on(color))


def _cell(row: int, column: int, **style: object) -> Rectangle:
    return Rectangle((column - 0.5, row - 0.5), 1, 1, **style)  # pyright: ignore[reportArgumentType]


def _failed(row: int, column: int, theme: Theme) -> Rectangle:
    # Before matplotlib 3.11 a hatch has the edge's color, so the edge can't separate the cells as well.
    return _cell(row, column, hatch="////", linewidth=0, facecolor=theme.failed, edgecolor=theme.faint)


def _number_style(plot: HeatMap) -> tuple[int, float] | None:
    """Decimals and font size with which every number fits its cell, or None if there is no such pair."""
    room = 0.85 * _WIDTH / len(plot.xticks)
    values = [value for row in plot.values for value in row if value is not None and math.isfinite(value)]
    for decimals in (1, 0):
        longest = max((len(_cell_text(value, plot.percent, decimals)) for value in values), default=0)
        for size in _FONT_SIZES:
            if longest * _DIGIT_WIDTH * size <= room and len(plot.yticks) <= _MOST_ROWS:
                return decimals, size
    return None


def _cell_text(value: float, percent: bool, decimals: int) -> str:
    return f"{100 * value:.{decimals}f}" if percent else number(float(f"{value:.{decimals + 2}g}"))


def _ink_on(color: Sequence[float]) -> str:
    """Black or white, whichever has the higher contrast with `color` (relative luminance of WCAG 2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if (luminance + 0.05) ** 2 > 0.05 * 1.05 else "#ffffff"


def _draw_scale(axes: Axes, plot: HeatMap, ramp: Colormap) -> None:
    scale = ScalarMappable(Normalize(plot.low, plot.high), ramp)
    bar = axes.figure.colorbar(scale, ax=axes, format=PlainFormatter(plot.percent), pad=0.02)
    bar.ax.spines[:].set_visible(False)
    bar.ax.tick_params(length=0)


def _draw_key(axes: Axes, plot: HeatMap, theme: Theme) -> None:
    """Outline the best cell, and say above the map what outline and hatching mean."""
    key: dict[str, Patch] = {}
    if plot.best is not None:
        outline = {"facecolor": "none", "edgecolor": theme.curves[1], "linewidth": 2.5}
        halo = [withStroke(linewidth=5.5, foreground=theme.background)]
        axes.add_patch(_cell(*plot.best, **outline, clip_on=False, zorder=3, path_effects=halo))
        key["best"] = _cell(0, 0, **outline)
    if any(value is None or not math.isfinite(value) for row in plot.values for value in row):
        key["run failed"] = _failed(0, 0, theme)
    if key:
        place = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 2}
        axes.legend(key.values(), key.keys(), handlelength=1.1, handleheight=0.9, **place)
