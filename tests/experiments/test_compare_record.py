import math

import numpy as np
import pytest

from bnkit.experiments._record import Configuration, NetRecord, drift, mean_and_spread, typical_unit

NAN = math.nan


@pytest.fixture
def record():
    made = NetRecord("with BN", Configuration("batch", 0.5, 0.01), seeds=[3, 4])
    made.add(0, 0.0, [0.1, 0.2], [2.3, 2.3])
    made.add(10, 1.0, [0.95, 0.9], [0.2, 0.3])
    made.add(20, 2.0, [0.94, NAN], [0.2, NAN])
    return made


def test_best_and_final_are_of_each_seed(record):
    assert record.best() == [0.95, 0.9]
    assert record.final()[0] == 0.94
    assert math.isnan(record.final()[1])
    assert record.latest() == 0.94


def test_steps_to_is_the_first_evaluation_that_got_there(record):
    assert record.steps_to([0.95, 0.95]) == [10.0, math.inf]
    assert record.steps_to([0.1, 0.9]) == [0.0, 10.0]
    assert [record.seconds_at(step) for step in record.steps_to([0.95, 0.95])] == [1.0, math.inf]


def test_a_record_without_evaluations_has_no_accuracy():
    empty = NetRecord("x", Configuration("none", 1.0), seeds=[0])
    assert math.isnan(empty.best()[0])
    assert math.isnan(empty.final()[0])
    assert math.isnan(empty.latest())
    assert empty.steps_to([0.5]) == [math.inf]


def test_spread_is_the_sample_standard_deviation():
    assert mean_and_spread([1.0, 3.0]) == (2.0, math.sqrt(2))
    assert math.isnan(mean_and_spread([1.0])[1])


def test_drift_counts_in_final_widths():
    final = np.array([[-1.0, 0.0, 1.0], [0.0, 5.0, 10.0]])
    shifted = final + np.array([[2.0], [5.0]])
    assert np.allclose(drift([shifted, final]), [[1.0, 0.5], [0.0, 0.0]])


def test_drift_sees_a_change_of_width_alone():
    final = np.array([[-1.0, 0.0, 1.0]])
    assert np.allclose(drift([3 * final, final])[0], (2 + 0 + 2) / 3 / 2)


def test_typical_unit_has_the_median_drift():
    final = np.tile([-1.0, 0.0, 1.0], (5, 1))
    moved = final + np.array([[9.0], [1.0], [4.0], [2.0], [7.0]])
    assert typical_unit([moved, final]) == 2
