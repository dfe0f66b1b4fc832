"""A `LinePlot` on matplotlib axes."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from ._axes import say_no_data, set_labels, set_ticks
from ._model import Curve, LinePlot, Values
from ._palette import Theme
from ._thin import thin
from ._words import printable

_LONGEST_END_LABEL = 14
_END_LABEL_GAP = 0.075  # of the axes' height: a line of text
_EARLY = 0.03  # of the axes' width
_LEGEND_CHARACTERS = 46
_LEGEND_SAMPLE = 6  # characters that a legend's line sample takes


def draw_lines(axes: Axes, plot: LinePlot, theme: Theme) -> None:
    """Draw bands, lines, axes and the curves' names."""
    if plot.xlog:
        axes.set_xscale("log")
    if plot.ylog:
        axes.set_yscale("log")
    axes.margins(x=0, y=0.06)
    lines = [_draw_curve(axes, plot, curve, theme.curve_color(curve.color, i)) for i, curve in enumerate(plot.curves)]
    if plot.ylim is not None:
        axes.set_ylim(plot.ylim)
    axes.autoscale_view()  # matplotlib would put it off until after the names' positions are computed
    set_labels(axes, plot.xlabel, plot.ylabel)
    if any(_drawn_points(line).size for line in lines):
        axes.grid(axis="y")
        set_ticks(axes.xaxis)
        set_ticks(axes.yaxis, plot.percent)
        _mark_early_ends(axes, lines)
    else:
        say_no_data(axes, theme)
    _name_curves(axes, lines)


def _draw_curve(axes: Axes, plot: LinePlot, curve: Curve, color: str) -> Line2D:
    x, y = _drawable(curve.x, plot.xlog), _drawable(curve.y, plot.ylog)
    edges = [_drawable(edge, plot.ylog) for edge in (curve.low, curve.high) if edge is not None]
    kept = thin(np.log(x) if plot.xlog else x, y, *edges)
    if edges:
        low, high = (edge[kept] for edge in edges)
        axes.fill_between(x[kept], low, high, color=color, alpha=0.22, linewidth=0)
    style = (0, (4.5, 2.2)) if curve.dashed else "solid"
    x, y = x[kept], y[kept]
    alone = _isolated(np.isfinite(x) & np.isfinite(y))
    if alone.any():
        axes.plot(x[alone], y[alone], "o", color=color, markersize=5, clip_on=False, in_layout=False)
    (line,) = axes.plot(x, y, color=color, linestyle=style, label=printable(curve.label))
    return line


def _drawable(values: Values, positive: bool) -> NDArray[np.float64]:
    """`values` with NaN, which leaves a gap, for what the axis can't show."""
    array = np.asarray(values, dtype=np.float64)
    return np.where(np.isfinite(array) & ((array > 0) | (not positive)), array, np.nan)


def _isolated(finite: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Points with a gap on either side, which a line alone would not show."""
    padded = np.pad(finite, 1)
    return finite & ~padded[:-2] & ~padded[2:]


def _drawn_points(line: Line2D) -> NDArray[np.float64]:
    points = np.asarray(line.get_xydata())
    return points[np.isfinite(points).all(axis=1)]


def _mark_early_ends(axes: Axes, lines: Sequence[Line2D]) -> None:
    """A cross where a curve stops well before the longest does: its run failed or was cut short."""
    ends = {line: _drawn_points(line)[-1] for line in lines if _drawn_points(line).size}
    longest = max(_in_axes(axes, end)[0] for end in ends.values())
    for line, end in ends.items():
        if _in_axes(axes, end)[0] < longest - _EARLY:
            axes.plot(*end, "x", color=line.get_color(), markersize=7, markeredgewidth=1.8)


def _in_axes(axes: Axes, point: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray((axes.transData + axes.transAxes.inverted()).transform(point))


def _label(line: Line2D) -> str:
    return str(line.get_label())


def _name_curves(axes: Axes, lines: Sequence[Line2D]) -> None:
    """Write short names at their curves' ends, longer ones in a legend above the axes."""
    if all(_drawn_points(line).size and len(_label(line)) <= _LONGEST_END_LABEL for line in lines):
        _name_ends(axes, lines)
        return
    labels = [_label(line) + ("" if _drawn_points(line).size else " (no data)") for line in lines]
    columns = _LEGEND_CHARACTERS // (max(map(len, labels)) + _LEGEND_SAMPLE)
    axes.legend(
        lines,
        [textwrap.fill(label, _LEGEND_CHARACTERS - _LEGEND_SAMPLE) for label in labels],
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=min(max(columns, 1), len(lines)),
    )


def _name_ends(axes: Axes, lines: Sequence[Line2D]) -> None:
    heights = np.clip([_in_axes(axes, _drawn_points(line)[-1])[1] for line in lines], 0, 1)
    for line, height in zip(lines, spread(heights, _END_LABEL_GAP), strict=True):
        axes.text(1.02, height, _label(line), transform=axes.transAxes, color=line.get_color(), va="center_baseline")


def spread(heights: Sequence[float] | NDArray[np.float64], gap: float) -> list[float]:
    """`heights`, in the order given, moved to lie at least `gap` apart and none above 1."""
    order = np.argsort(heights, kind="stable")
    placed = np.asarray(heights, dtype=np.float64)[order]
    for i in range(1, len(placed)):
        placed[i] = max(placed[i], placed[i - 1] + gap)
    ceiling = 1.0
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], ceiling)
        ceiling = placed[i] - gap
    result = np.empty_like(placed)
    result[order] = placed
    return result.tolist()
