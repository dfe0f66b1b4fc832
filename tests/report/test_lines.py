from __future__ import annotations

import math

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from bnkit.report import Curve, LinePlot
from bnkit.report._lines import draw_lines, spread
from bnkit.report._palette import LIGHT


def _drawn(plot: LinePlot) -> Axes:
    axes = Figure().subplots()
    draw_lines(axes, plot, LIGHT)
    return axes


def _texts(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def _legend(axes: Axes) -> list[str]:
    legend = axes.get_legend()
    return [] if legend is None else [text.get_text() for text in legend.get_texts()]


def test_values_that_are_not_finite_leave_a_gap() -> None:
    axes = _drawn(LinePlot("t", "x", "y", [Curve("a", [0, 1, 2, 3, 4], [1, 2, math.inf, math.nan, 3])]))
    isolated, line = axes.lines
    assert np.isnan(line.get_ydata()).tolist() == [False, False, True, True, False]
    assert np.asarray(isolated.get_xydata()).tolist() == [[4, 3]]


def test_a_logarithmic_axis_leaves_out_what_is_not_positive() -> None:
    axes = _drawn(LinePlot("t", "x", "y", [Curve("a", [0, 1, 10, 20], [5, -1, 2, 3])], xlog=True, ylog=True))
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    drawn = np.asarray(axes.lines[0].get_xydata())
    assert drawn[np.isfinite(drawn).all(axis=1)].tolist() == [[10, 2], [20, 3]]


def test_the_band_covers_low_to_high() -> None:
    axes = _drawn(LinePlot("t", "x", "y", [Curve("a", [0, 1], [5, 6], low=[4, 5], high=[7, 9])]))
    (band,) = axes.collections
    outline = band.get_paths()[0].vertices
    assert {(0, 4), (1, 5), (1, 9), (0, 7)} <= {tuple(vertex) for vertex in np.asarray(outline).tolist()}


def test_short_names_stand_at_their_ends_and_longer_ones_in_a_legend() -> None:
    short = _drawn(LinePlot("t", "x", "y", [Curve("up", [0, 1], [0, 9]), Curve("down", [0, 1], [9, 0])]))
    assert _texts(short) == ["up", "down"]
    assert short.texts[0].get_position()[1] > short.texts[1].get_position()[1]
    assert short.get_legend() is None
    long = _drawn(LinePlot("t", "x", "y", [Curve("up", [0, 1], [0, 9]), Curve("without batch norm", [0, 1], [9, 0])]))
    assert _texts(long) == []
    assert _legend(long) == ["up", "without batch norm"]


def test_an_empty_curve_is_named_as_such() -> None:
    axes = _drawn(LinePlot("t", "x", "y", [Curve("a", [0, 1], [0, 9]), Curve("b", [], [])]))
    assert _legend(axes) == ["a", "b (no data)"]
    assert _texts(axes) == []


@pytest.mark.parametrize("curves", [[], [Curve("a", [], [])], [Curve("a", [1, 2], [math.nan, math.inf])]])
def test_no_data_at_all_is_said(curves: list[Curve]) -> None:
    axes = _drawn(LinePlot("t", "x", "y", curves, ylog=True))
    assert "no data" in _texts(axes)


def test_a_curve_that_stops_early_is_marked_there() -> None:
    axes = _drawn(LinePlot("t", "x", "y", [Curve("a", [0, 10], [0, 9]), Curve("b", [0, 4], [0, 3])]))
    crosses = [line for line in axes.lines if line.get_marker() == "x"]
    assert [np.asarray(cross.get_xydata()).tolist() for cross in crosses] == [[[4, 3]]]


def test_colors_dashes_limits_and_percentages() -> None:
    curves = [Curve("a", [0, 1], [0.2, 0.4], color=3), Curve("b", [0, 1], [0.3, 0.5], dashed=True)]
    axes = _drawn(LinePlot("t", "the x", "the y", curves, ylim=(0.0, 1.0), percent=True))
    first, second = axes.lines
    assert (to_hex(first.get_color()), to_hex(second.get_color())) == (LIGHT.curves[3], LIGHT.curves[1])
    assert (first.get_linestyle(), second.get_linestyle()) == ("-", "--")
    assert axes.get_ylim() == (0.0, 1.0)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("the x", "the y")
    assert axes.yaxis.get_major_formatter().format_ticks([0, 0.5]) == ["0%", "50%"]


def test_a_long_curve_is_thinned() -> None:
    x = np.arange(50_000.0)
    axes = _drawn(LinePlot("t", "x", "y", [Curve("a", x, np.random.default_rng(0).normal(size=len(x)))]))
    assert len(axes.lines[0].get_xdata()) <= 502


def test_spread_keeps_order_and_distance() -> None:
    assert spread([0.2, 0.8], 0.1) == [0.2, 0.8]
    assert spread([0.52, 0.5, 0.51], 0.1) == pytest.approx([0.7, 0.5, 0.6])
    assert spread([1.0, 0.99], 0.1) == pytest.approx([1.0, 0.9])
    assert spread([], 0.1) == []
