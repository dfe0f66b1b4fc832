from __future__ import annotations

import numpy as np

from bnkit.report._thin import thin


def test_short_curves_are_left_alone() -> None:
    x = np.arange(20.0)
    assert thin(x, x, bins=10).tolist() == list(range(20))


def test_every_bin_keeps_its_extremes_of_line_and_band() -> None:
    rng = np.random.default_rng(0)
    x = np.arange(10_000.0)
    y, low, high = rng.normal(size=(3, len(x)))
    kept = thin(x, y, low, high, bins=100)
    assert len(kept) <= 100 * 6 + 2
    assert {0, len(x) - 1} <= set(kept.tolist())
    bin_of = np.minimum(x / x[-1] * 100, 99).astype(int)
    for height in (y, low, high):
        for i in range(100):
            inside = kept[bin_of[kept] == i]
            assert height[inside].min() == height[bin_of == i].min()
            assert height[inside].max() == height[bin_of == i].max()


def test_gaps_survive() -> None:
    x = np.arange(10_000.0)
    y = np.sin(x / 500)
    y[5003] = np.nan
    y[7000:8000] = np.nan
    kept = thin(x, y, bins=100)
    assert 5003 in kept
    drawn = x[kept][np.isfinite(y[kept])]
    assert not ((drawn >= 7000) & (drawn < 8000)).any()
    assert np.isnan(y[kept][(x[kept] >= 7000) & (x[kept] < 8000)]).any()


def test_points_that_crowd_at_one_end_are_thinned_there_only() -> None:
    position = np.log(np.arange(1.0, 50_001.0))
    kept = thin(position, np.cos(position), bins=100)
    assert kept[:20].tolist() == list(range(20))
    assert len(kept) <= 202


def test_no_finite_position_and_a_single_position() -> None:
    values = np.arange(1000.0)
    assert 0 < len(thin(np.full(1000, np.nan), values, bins=10)) <= 4
    assert thin(np.zeros(1000), values, bins=10).tolist() == [0, 999]
