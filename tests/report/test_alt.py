from __future__ import annotations

import math

from bnkit.report import Curve, HeatMap, LinePlot
from bnkit.report._alt import describe


def test_a_line_plot_says_where_its_curves_end() -> None:
    plot = LinePlot(
        "Accuracy",
        "step",
        "test accuracy",
        [Curve("with BN", [0, 1, 2], [0.1, 0.98, math.nan]), Curve("without", [], [])],
        percent=True,
    )
    assert describe(plot) == "Accuracy: test accuracy against step. At the end: with BN 98%; without no data."


def test_a_heat_map_says_its_range_best_and_failures() -> None:
    plot = HeatMap("Grid", "rate", "scale", ["1", "2"], ["a", "b"], [[0.1, None], [math.nan, 0.9]], 0, 1, best=(1, 1))
    assert describe(plot) == (
        "Grid: a grid of scale by rate, 4 runs from 10% to 90%; best at rate 2, scale b; 2 failed."
    )


def test_nothing_measured() -> None:
    assert describe(LinePlot("t", "x", "y", [])) == "t: y against x. At the end: no data."
    assert describe(HeatMap("t", "x", "y", ["1"], ["1"], [[None]], 0, 1)) == "t: a grid of y by x, 1 runs; 1 failed."
