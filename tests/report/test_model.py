from __future__ import annotations

import pytest

from bnkit.report import Curve, HeatMap, Table


def test_a_curve_needs_as_many_x_as_y() -> None:
    with pytest.raises(AssertionError, match="a: 2 x for 1 y"):
        Curve("a", [0, 1], [0])


def test_a_band_needs_both_edges_at_full_length() -> None:
    with pytest.raises(AssertionError, match="needs low and high"):
        Curve("a", [0, 1], [0, 1], low=[0, 1])
    with pytest.raises(AssertionError, match="not as long as x"):
        Curve("a", [0, 1], [0, 1], low=[0, 1], high=[1])


def test_a_heat_map_needs_a_value_for_every_pair_of_names() -> None:
    with pytest.raises(AssertionError, match="1 rows, 2 names"):
        HeatMap("m", "x", "y", ["1"], ["1", "2"], [[0.5]], 0, 1)
    with pytest.raises(AssertionError, match="2 columns, 1 names"):
        HeatMap("m", "x", "y", ["1"], ["1"], [[0.5, 0.6]], 0, 1)


def test_a_table_needs_a_cell_for_every_column() -> None:
    with pytest.raises(AssertionError, match="t: 1 cells for 2 columns"):
        Table("t", ["a", "b"], [["1"]])
