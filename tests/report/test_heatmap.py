from __future__ import annotations

import math

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from bnkit.report import HeatMap
from bnkit.report._heatmap import draw_heatmap
from bnkit.report._palette import DARK, LIGHT, Theme


def _drawn(plot: HeatMap, theme: Theme = LIGHT) -> Axes:
    axes = Figure().subplots()
    draw_heatmap(axes, plot, theme)
    return axes


def _map(values: list[list[float | None]], **options: object) -> HeatMap:
    columns, rows = [f"c{i}" for i in range(len(values[0]))], [f"r{i}" for i in range(len(values))]
    return HeatMap("t", "rate", "scale", columns, rows, values, low=0.0, high=1.0, **options)  # pyright: ignore


def _cells(axes: Axes) -> dict[tuple[float, float], Rectangle]:
    return {patch.get_xy(): patch for patch in axes.patches if isinstance(patch, Rectangle) and patch.get_zorder() < 3}


def _key(axes: Axes) -> list[str]:
    legend = axes.get_legend()
    return [] if legend is None else [text.get_text() for text in legend.get_texts()]


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_cells_take_the_color_and_number_of_their_value(theme: Theme) -> None:
    axes = _drawn(_map([[0.0, 1.0], [0.973, 2.0]]), theme)
    cells = _cells(axes)
    assert to_hex(cells[-0.5, -0.5].get_facecolor()) == theme.ramp[0]
    assert to_hex(cells[0.5, -0.5].get_facecolor()) == theme.ramp[-1]
    assert to_hex(cells[0.5, 0.5].get_facecolor()) == theme.ramp[-1]
    numbers = {text.get_position(): text.get_text() for text in axes.texts}
    assert numbers == {(0, 0): "0.0", (1, 0): "100.0", (0, 1): "97.3", (1, 1): "200.0", (1, 1.02): "percent"}
    assert [text.get_text() for text in axes.get_yticklabels()] == ["r0", "r1"]
    assert axes.get_ylim() == (-0.5, 1.5)


def test_failed_runs_are_hatched_and_explained() -> None:
    axes = _drawn(_map([[None, math.nan, math.inf, 0.5]]))
    hatched = {patch.get_xy() for patch in axes.patches if isinstance(patch, Rectangle) and patch.get_hatch()}
    assert hatched == {(-0.5, -0.5), (0.5, -0.5), (1.5, -0.5)}
    assert _key(axes) == ["run failed"]


def test_the_best_cell_is_outlined_and_explained() -> None:
    axes = _drawn(_map([[0.1, 0.2], [0.3, 0.4]], best=(1, 0)))
    (outline,) = [patch for patch in axes.patches if patch.get_zorder() == 3]
    assert isinstance(outline, Rectangle)
    assert outline.get_xy() == (-0.5, 0.5)
    assert _key(axes) == ["best"]


def test_plain_values_are_shown_as_they_are() -> None:
    axes = _drawn(_map([[1234.0, 0.5]], percent=False))
    assert [text.get_text() for text in axes.texts] == ["1,230", "0.5"]


def test_crowded_cells_lose_their_numbers_for_a_scale() -> None:
    axes = _drawn(_map(np.full((3, 40), 0.5).tolist()))
    assert len(axes.texts) == 0
    assert len(axes.get_figure().axes) == 2  # pyright: ignore
    assert len(axes.get_xticks()) < 40


def test_no_runs_at_all_is_said() -> None:
    axes = _drawn(HeatMap("t", "x", "y", [], [], [], 0, 1))
    assert [text.get_text() for text in axes.texts] == ["no data"]


def test_a_scale_without_extent_is_fine() -> None:
    axes = _drawn(HeatMap("t", "x", "y", ["a"], ["b"], [[0.5]], low=0.5, high=0.5))
    assert to_hex(_cells(axes)[-0.5, -0.5].get_facecolor()) == LIGHT.ramp[0]
