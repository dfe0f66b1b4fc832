"""The sentences follow the numbers, whichever way they fall."""

import math

import numpy as np
import pytest

from bnkit.experiments import CompareConfig, Comparison
from bnkit.experiments._compare_words import speed_up, summary, tables
from bnkit.experiments._grid import Grid
from bnkit.experiments._record import Configuration, NetRecord


def record(norm, accuracies, rate=0.5):
    """Evaluated every 100 steps, with BN's steps half as fast again; one list of accuracies a seed."""
    made = NetRecord(norm, Configuration(norm, rate, 0.01), seeds=list(range(len(accuracies))))
    seconds = 0.02 if norm == "batch" else 0.01
    for i, row in enumerate(zip(*accuracies, strict=True)):
        made.add(100 * i, 100 * i * seconds, row, [0.0] * len(row))
    return made


def comparison(protocol, tuned=(), grid=None):
    return Comparison(CompareConfig(seeds=len(protocol[0].seeds)), list(protocol), list(tuned), grid, None, 1.0, {})


SLOW = [[0.1, 0.5, 0.8, 0.9, 0.96]]
FAST = [[0.1, 0.97, 0.975, 0.98, 0.979]]


def test_faster():
    sentence = summary(comparison([record("none", SLOW), record("batch", FAST)]))[0]
    assert "the network with BN reaches the best accuracy without BN in 4.0 times fewer steps" in sentence
    assert "its best is 98.00%, against 96.00% without BN" in sentence
    assert "At one learning rate (rate 0.5, initial std 0.01)" in sentence


def test_slower():
    sentence = summary(comparison([record("none", [[0.1, 0.9, 0.9]]), record("batch", [[0.1, 0.5, 0.95]])]))[0]
    assert "with BN needs 2.0 times the steps" in sentence


def test_abreast():
    sentence = summary(comparison([record("none", FAST), record("batch", FAST)]))[0]
    assert "with BN needs about as many steps" in sentence


def test_never():
    sentence = summary(comparison([record("none", FAST), record("batch", SLOW)]))[0]
    assert "with BN does not reach the best accuracy without BN;" in sentence


def test_there_before_training():
    sentence = summary(comparison([record("none", [[0.1, 0.5]]), record("batch", [[0.6, 0.7]])]))[0]
    assert "with BN has the best accuracy without BN before it is trained;" in sentence


def test_not_on_most_seeds():
    sentence = summary(comparison([record("none", FAST * 3), record("batch", SLOW * 2 + FAST)]))[0]
    assert "does not reach the best accuracy without BN on most seeds" in sentence


def test_different_settings_are_both_named():
    tuned = [record("none", SLOW, rate=2.0), record("batch", FAST, rate=1.0)]
    sentence = summary(comparison([record("none", SLOW), record("batch", FAST)], tuned))[1]
    assert sentence.startswith(
        "Each at its own best settings (without BN: rate 2, initial std 0.01; with BN: rate 1, initial std 0.01)"
    )


def test_speed_up_in_steps_and_in_seconds():
    slow, fast = record("none", SLOW), record("batch", FAST)
    steps, seconds = speed_up(slow, fast, [0.96])
    assert steps == [4.0]
    assert seconds == [2.0]
    steps, _ = speed_up(slow, fast, [0.98])
    assert math.isnan(steps[0])


def test_table_rows():
    result = comparison([record("none", SLOW), record("batch", FAST)])
    reached, faster = tables(result)
    assert reached.columns[:5] == ["network", "rate", "init std", "best %", "final %"]
    assert reached.rows[0] == [
        "without BN",
        "0.5",
        "0.01",
        "96.00",
        "96.00",
        "400 (4.0)",
        "400 (4.0)",
        "never",
        "never",
        "never",
    ]
    assert reached.rows[1][3:] == ["98.00", "97.90", "100 (2.0)", "100 (2.0)", "100 (2.0)", "300 (6.0)", "100 (2.0)"]
    assert faster.rows == [["steps", "4.00", "4.00", "–", "–", "4.00"], ["seconds", "2.00", "2.00", "–", "–", "2.00"]]


def test_spread_over_seeds_counts_those_that_got_there():
    result = comparison([record("none", SLOW * 2), record("batch", FAST + SLOW)])
    row = tables(result)[0].rows[1]
    assert row[3] == "97.00 ± 1.41"
    assert row[6] == "250 ± 212 (5.0 ± 4.2)"
    assert row[7] == "100, 1 of 2 seeds (2.0, 1 of 2 seeds)"


def test_grid_counts_cells():
    accuracy = np.array([[[0.95, 0.2], [math.nan, 0.9]], [[0.95, 0.92], [0.91, 0.9]]])
    grid = Grid(["none", "batch"], (0.1, 1.0), (0.01, 0.1), accuracy, 1000, 1000, 100)
    assert grid.best("none") == (0, 0)
    assert grid.best_configuration("batch") == Configuration("batch", 0.1, 0.01)
    sentence = summary(comparison([record("none", SLOW)], grid=grid))[-1]
    assert sentence == (
        "Of 4 pairs of learning rate and initial scale, 2 without BN and 4 with BN reach 90% within 1,000 steps."
    )


def test_nothing_measured():
    empty = NetRecord("none", Configuration("none", 1.0), seeds=[0])
    assert summary(comparison([empty])) == ["Nothing was measured before the run ended."]
    assert tables(comparison([empty])) == []


@pytest.mark.parametrize("norms", [("none",), ("none", "batch", "group")])
def test_any_number_of_norms(norms):
    result = comparison([record(norm, FAST) for norm in norms])
    assert len(tables(result)) == len(norms)
    assert all(len(row) == len(table.columns) for table in tables(result) for row in table.rows)
