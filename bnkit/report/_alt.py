"""A plot in words, for readers who can't see it."""

from __future__ import annotations

import math

from ._model import Curve, HeatMap, LinePlot, Plot
from ._words import number


def describe(plot: Plot) -> str:
    """One or two sentences: what is drawn, and the values that matter."""
    return _describe_heatmap(plot) if isinstance(plot, HeatMap) else _describe_lines(plot)


def _describe_lines(plot: LinePlot) -> str:
    ends = "; ".join(f"{curve.label} {_last(curve, plot.percent)}" for curve in plot.curves)
    return f"{plot.title}: {plot.ylabel} against {plot.xlabel}. At the end: {ends or 'no data'}."


def _last(curve: Curve, percent: bool) -> str:
    finite = [y for y in curve.y if math.isfinite(y)]
    return number(finite[-1], percent) if finite else "no data"


def _describe_heatmap(plot: HeatMap) -> str:
    cells = [value for row in plot.values for value in row]
    finite = [value for value in cells if value is not None and math.isfinite(value)]
    words = f"{plot.title}: a grid of {plot.ylabel} by {plot.xlabel}, {len(cells)} runs"
    if finite:
        words += f" from {number(min(finite), plot.percent)} to {number(max(finite), plot.percent)}"
    if plot.best is not None:
        row, column = plot.best
        words += f"; best at {plot.xlabel} {plot.xticks[column]}, {plot.ylabel} {plot.yticks[row]}"
    failed = len(cells) - len(finite)
    return f"{words}; {failed} failed." if failed else f"{words}."
