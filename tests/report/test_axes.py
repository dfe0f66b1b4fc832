from __future__ import annotations

import pytest
from matplotlib.figure import Figure

from bnkit.report._axes import LogFormatter, PlainFormatter, set_ticks


@pytest.mark.parametrize(
    ("percent", "values", "texts"),
    [
        (False, [0, 10_000, 20_000], ["0", "10,000", "20,000"]),
        (False, [-2.5, 0, 2.5], ["−2.5", "0.0", "2.5"]),
        (False, [0.1, 0.2, 0.30000000000000004], ["0.1", "0.2", "0.3"]),
        (False, [0, 5e8], ["0", "5e+08"]),
        (True, [0, 0.5, 1], ["0%", "50%", "100%"]),
        (True, [0.975, 0.98], ["97.5%", "98.0%"]),
    ],
)
def test_plain_ticks_have_the_decimals_they_need(percent: bool, values: list[float], texts: list[str]) -> None:
    assert PlainFormatter(percent).format_ticks(values) == texts


def test_logarithmic_ticks_are_short() -> None:
    values = [1e-7, 0.001, 0.02, 1, 10_000, 1e6, 2e9]
    assert LogFormatter().format_ticks(values) == ["10⁻⁷", "0.001", "0.02", "1", "10,000", "10⁶", "2·10⁹"]
    assert LogFormatter(percent=True).format_ticks([0.01, 1]) == ["1%", "100%"]


@pytest.mark.parametrize(("high", "expected"), [(50, [1, 2, 5, 10, 20, 50]), (1e5, [1, 10, 100, 1e3, 1e4, 1e5])])
def test_a_short_logarithmic_axis_is_divided_more_finely(high: float, expected: list[float]) -> None:
    axes = Figure().subplots()
    axes.set_xscale("log")
    axes.set_xlim(1, high)
    set_ticks(axes.xaxis)
    assert [tick for tick in axes.get_xticks() if 1 <= tick <= high] == pytest.approx(expected)
