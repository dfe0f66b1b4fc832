"""What the figures of a comparison show."""

import numpy as np
import pytest

from bnkit.experiments import CompareConfig, Comparison, page_of
from bnkit.experiments._compare_page import figures
from bnkit.experiments._grid import Grid
from bnkit.experiments._record import Configuration, NetRecord


def record(norm, accuracy=(0.1, 0.9, 0.95), seeds=2, units=3):
    made = NetRecord(norm, Configuration(norm, 0.5, 0.01), seeds=list(range(seeds)))
    for i, value in enumerate(accuracy):
        percentiles = np.array([[-1.0 - i, 0.1 * i, 1.0 + i]] * units) * np.arange(1, units + 1)[:, None]
        made.add(10 * i, 0.1 * i, [value + 0.02 * seed for seed in range(seeds)], [0.0] * seeds, percentiles)
    return made


@pytest.fixture
def result():
    accuracy = np.array([[[0.1, 0.9], [0.2, np.nan]], [[0.8, 0.95], [0.9, 0.7]]])
    grid = Grid(["none", "batch"], (0.1, 1.0), (0.01, 0.1), accuracy, 1000, 1000, 100)
    config = CompareConfig(seeds=2)
    return Comparison(config, [record("none"), record("batch")], [record("none"), record("batch")], grid, None, 1.0, {})


def test_accuracy_curves_are_means_with_a_band_of_one_standard_deviation(result):
    protocol, tuned = figures(result)[0].plots
    assert [curve.label for curve in protocol.curves] == ["without BN", "with BN"]
    assert [curve.label for curve in tuned.curves] == ["without BN", "with BN"]
    curve = protocol.curves[1]
    assert list(curve.x) == [0, 10, 20]
    assert curve.y == pytest.approx([0.11, 0.91, 0.96])
    half = np.std([0.0, 0.02], ddof=1)
    assert curve.high == pytest.approx([0.11 + half, 0.91 + half, 0.96 + half])
    assert curve.low == pytest.approx([0.11 - half, 0.91 - half, 0.96 - half])


def test_one_seed_has_no_band(result):
    result.protocol = [record("none", seeds=1)]
    assert figures(result)[0].plots[0].curves[0].low is None


@pytest.mark.parametrize(("accuracy", "ylim"), [((0.1, 0.9), (0.7, 1.0)), ((0.1, 0.3), None)])
def test_the_papers_axis_where_it_fits(result, accuracy, ylim):
    result.protocol = [record("none", accuracy)]
    assert figures(result)[0].plots[0].ylim == ylim


def test_activations_show_a_typical_unit_of_each_network_and_the_drift_of_all(result):
    without, with_bn, drift = figures(result)[1].plots
    # All units here have the same drift up to their scale, so any of them is typical; the band is its percentiles.
    (curve,) = without.curves
    unit = curve.high[0]
    assert curve.low == pytest.approx([-unit, -2 * unit, -3 * unit])
    assert [c.label for c in drift.curves] == ["without BN", "with BN"]
    # |q(t) - q(T)| of -1, 0, 1 against -3, 0.2, 3 is 2, 0.2, 2; the final width is 6.
    assert drift.curves[0].y == pytest.approx([4.2 / 3 / 6, 2.1 / 3 / 6, 0.0])
    assert with_bn.curves[0].color == 1


def test_a_network_that_diverged_shows_its_activations_up_to_then(result):
    result.protocol[0].percentiles = result.protocol[0].percentiles[:2]
    without, _, drift = figures(result)[1].plots
    assert list(without.curves[0].x) == [0, 10]
    assert list(drift.curves[0].x) == [0, 10]


def test_heat_maps_are_one_a_norm_with_the_best_cell(result):
    without, with_bn = figures(result)[2].plots
    assert without.best == (0, 1)
    assert with_bn.best == (0, 1)
    assert without.xticks == ["0.1", "1"]
    assert without.yticks == ["0.01", "0.1"]
    assert np.isnan(without.values[1][1])


def test_only_what_was_measured(result):
    result.grid = None
    result.tuned = []
    for each in result.protocol:
        each.percentiles = []
    assert [panels.name for panels in figures(result)] == ["accuracy"]


def test_the_page_tells_how_to_repeat_it_and_on_what_it_ran(result):
    result.environment = {"processor": "abacus"}
    result.partial = "interrupted"
    page = page_of(result, "bnkit compare --seeds 2")
    assert page.command == "bnkit compare --seeds 2"
    assert page.configuration["learning_rate"] == "0.5"
    assert page.configuration["seeds"] == 2
    assert page.environment["processor"] == "abacus"
    assert page.partial == "interrupted"
    assert page.title == "What batch normalization buys: mlp on digits"
