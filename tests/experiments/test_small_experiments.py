"""The small trained checks: they run, and their words follow the numbers, whatever they are."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn

from bnkit.experiments import large_batches, sequential_digits, small_batches
from bnkit.experiments._trials import Trial, accuracy_table, best_of, is_better, outcomes
from bnkit.nn import BatchRenorm, GhostBatchNorm, SyncBatchNorm


def trials(**accuracies):
    """Two seeds at one rate for each arm."""
    return [
        Trial(arm.replace("_", ", "), 0.1, seed, 1.0, accuracy, 2.0)
        for arm, values in accuracies.items()
        for seed, accuracy in enumerate(values)
    ]


def test_outcomes_are_means_over_seeds():
    found = outcomes(
        [Trial("a", 0.1, 0, 1.0, 0.5, 2.0), Trial("a", 0.1, 1, 3.0, 0.7, 4.0), Trial("a", 0.2, 0, 0, 0.9, 1)]
    )
    assert [(o.arm, o.rate, o.runs) for o in found] == [("a", 0.1, 2), ("a", 0.2, 1)]
    assert (found[0].accuracy, found[0].train_loss, found[0].seconds) == pytest.approx((0.6, 2.0, 3.0))
    assert found[0].deviation == pytest.approx(math.sqrt(0.02))
    assert [str(o) for o in found] == ["60.00% ± 14.14%", "90.00%"]
    assert best_of([*trials(a=(0.1, 0.2)), Trial("a", 0.2, 0, 0, 0.9, 1)], "a").rate == 0.2


def test_a_diverged_run_is_the_worst():
    diverged = Trial("a", 1.0, 0, math.nan, math.nan, math.nan)
    assert best_of([diverged, *trials(a=(0.1, 0.1))], "a").rate == 0.1
    assert str(best_of([diverged], "a")) == "diverged"
    good = best_of(trials(b=(0.1, 0.1)), "b")
    assert is_better(good, best_of([diverged], "a"))
    assert not is_better(best_of([diverged], "a"), good)
    table = accuracy_table([diverged, *trials(b=(0.1, 0.1))], "title")
    assert table.rows == [["a", "diverged", ""], ["b", "", "10.00% ± 0.00%"]]


@pytest.mark.parametrize(
    ("renorm", "word"),
    [((0.90, 0.91), ": better."), ((0.50, 0.51), ": worse."), ((0.70, 0.90), ": no better or worse than the noise.")],
)
def test_small_batches_words_follow_the_numbers(renorm, word):
    found = trials(none=(0.8, 0.8), batch=(0.80, 0.81), renorm=renorm, group=(0.8, 0.8))
    sentences = small_batches.summary(small_batches.SmallBatches(small_batches.SmallBatchesConfig(), found))
    assert sentences[0].startswith("Batch normalization reaches 80.50%")
    assert sentences[1].startswith("Batch renormalization reaches")
    assert sentences[1].endswith(word)


@pytest.mark.parametrize(
    ("ghosts", "word"),
    [((0.95, 0.95), "higher."), ((0.5, 0.5), "lower."), ((0.80, 0.81), "no different beyond the noise.")],
)
def test_large_batches_words_follow_the_numbers(ghosts, word):
    found = trials(large=(0.80, 0.81), small=(0.9, 0.91))
    for size, accuracies in ((32, ghosts), (2, (0.1, 0.1))):
        found += [dataclasses.replace(t, arm=f"large, ghosts of {size}") for t in trials(ghosts=accuracies)]
    sentences = large_batches.summary(large_batches.LargeBatches(large_batches.LargeBatchesConfig(), found))
    assert sentences[0].endswith(": a gap.")
    assert "ghosts of 32" in sentences[1]
    assert sentences[1].endswith(word)
    assert sentences[2].endswith("lower.")


@pytest.mark.parametrize(
    ("bn", "word"), [((0.9, 0.9), "higher."), ((0.1, 0.1), "lower."), ((0.5, 0.5), "no different.")]
)
def test_sequential_digits_words_follow_the_numbers(bn, word):
    result = sequential_digits.SequentialDigits(
        sequential_digits.SequentialDigitsConfig(), trials(LSTM=(0.5, 0.5), BNLSTM=bn)
    )
    assert sequential_digits.summary(result)[0].endswith(word)


def test_small_batches_runs():
    config = small_batches.SmallBatchesConfig(steps=3, rates=(0.01,), seeds=1)
    result = small_batches.small_batches(config)
    assert [trial.arm for trial in result.trials] == ["none", "batch", "renorm", "group"]
    assert all(0 <= trial.accuracy <= 1 and trial.train_loss > 0 for trial in result.trials)
    assert small_batches.page_of(result).tables[0].rows[2][0] == "renorm"


def test_large_batches_runs():
    config = large_batches.LargeBatchesConfig(images=64, epochs=1, large=64, small=16, rates=(0.01,), seeds=1)
    result = large_batches.large_batches(config)
    assert [trial.arm for trial in result.trials] == ["large", "large, ghosts of 32", "large, ghosts of 2", "small"]
    assert large_batches.page_of(result).configuration["images"] == 64


def test_sequential_digits_runs():
    config = sequential_digits.SequentialDigitsConfig(
        steps=2, batch_size=8, hidden_size=8, pixels=28, rates=(0.01,), seeds=1, test_images=500
    )
    result = sequential_digits.sequential_digits(config)
    assert [trial.arm for trial in result.trials] == ["LSTM", "BNLSTM"]
    assert all(0 <= trial.accuracy <= 1 for trial in result.trials)
    assert sequential_digits.page_of(result).tables[0].title == "Test accuracy after 2 updates, 28 time steps"


def test_the_same_seed_gives_the_same_run():
    config = small_batches.SmallBatchesConfig(steps=3, rates=(0.01,), seeds=1)
    first, second = (small_batches.small_batches(config).trials for _ in range(2))
    assert [(t.train_loss, t.accuracy) for t in first] == [(t.train_loss, t.accuracy) for t in second]


def test_the_networks_have_the_norms_they_are_named_for():
    norms = small_batches._norms(small_batches.SmallBatchesConfig(steps=4000, processes=2))
    renorm = [m for m in small_batches.small_network(norms["renorm"]).modules() if isinstance(m, BatchRenorm)]
    assert [m.num_features for m in renorm] == [16, 32, 64]
    assert renorm[0].r_max == (100, 800, 3.0)
    assert not any("Norm" in type(m).__name__ for m in small_batches.small_network(norms["none"]).modules())
    assert isinstance(norms["sync"](8), SyncBatchNorm)
    norm, size = large_batches._arms(large_batches.LargeBatchesConfig())["large, ghosts of 32"]
    layer = norm(8)
    assert isinstance(layer, GhostBatchNorm)
    assert (layer.ghost_size, size) == (32, 1024)
    assert small_batches.small_network(nn.BatchNorm2d)(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
