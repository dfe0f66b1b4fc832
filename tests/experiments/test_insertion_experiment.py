"""The insertion experiment: it runs, and its words follow the numbers."""

from __future__ import annotations

import math

import pytest
import torch

from bnkit.data import ImageSet
from bnkit.experiments import insertion as experiment
from bnkit.experiments._insertion_page import figure, page_of, summary
from bnkit.experiments._insertion_record import INSERTED, ORIGINAL, WITHOUT


def found(**arms: list[list[float]]) -> experiment.Insertion:
    """Of each arm the accuracies of a run a seed, at twice the best rate."""
    config = experiment.InsertionConfig(factors=(2.0,), fine_tuning_steps=60, eval_every=30)
    names = {"without": WITHOUT, "inserted": INSERTED}
    runs = [run(names[arm], 0.2, seed, values) for arm, seeds in arms.items() for seed, values in enumerate(seeds)]
    trainings = [run(ORIGINAL, rate, 0, [0.1, 0.3, end]) for rate, end in ((0.1, 0.5), (0.3, 0.4))]
    return experiment.Insertion(config, trainings, runs, 1e-7)


def run(arm: str, rate: float, seed: int, values: list[float]) -> experiment.Run:
    return experiment.Run(arm, rate, seed, 1.0, values[-1] if len(values) == 3 else math.nan, 1.0, values)


@pytest.mark.parametrize(("ends", "word"), [((0.5, 0.7), "higher than"), ((0.7, 0.5), "lower than"),
                                            ((0.6, 0.61), "no different beyond the noise than")])  # fmt: skip
def test_words_follow_the_numbers(ends, word):
    without, inserted = ([[0.5, 0.5, end - 0.01], [0.5, 0.5, end + 0.01]] for end in ends)
    first, second, _ = summary(found(without=without, inserted=inserted))
    assert first == "Trained without batch norm, the network has 50.00% at its best rate, 0.1."
    assert f"{ends[1]:.2%} ± 1.41% at 2 times that rate, {word} without: {ends[0]:.2%} ± 1.41% at 2 times." in second


def test_a_divergence_is_told_and_drawn():
    result = found(without=[[0.5], [0.5, 0.6, 0.8]], inserted=[[0.5, 0.6, 0.7], [0.5, 0.7, 0.9]])
    assert "higher than without: diverged" in summary(result)[1]
    (plot,) = figure(result).plots
    assert [curve.label for curve in plot.curves] == ["without batch norm (diverged)", "batch norm inserted"]
    assert list(plot.curves[0].x) == [0]
    assert list(plot.curves[1].x) == [0, 30, 60]
    assert list(plot.curves[1].y) == pytest.approx([0.5, 0.65, 0.8])
    assert (list(plot.curves[1].low), list(plot.curves[1].high)) == ([0.5, 0.6, 0.7], [0.5, 0.7, 0.9])
    assert page_of(result).tables[1].rows == [[WITHOUT, "diverged"], [INSERTED, "80.00% ± 14.14%"]]


def test_every_arm_starts_where_the_training_ended():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(80) % 2
    pixels = (torch.randint(0, 128, (80, 1, 32, 32), generator=generator) + 127 * labels.view(-1, 1, 1, 1)).byte()
    images = ImageSet("two", pixels, labels, pixels[:40], labels[:40], ("dark", "light"))
    config = experiment.InsertionConfig(
        width=2, steps=4, rates=(0.01,), fine_tuning_steps=4, batch_size=8, calibration_images=40, test_images=20,
        eval_every=2, seeds=2,
    )  # fmt: skip
    result = experiment.fine_tune(images, config)
    assert [(run.arm, run.rate, run.seed) for run in result.runs] == [
        (arm, factor * 0.01, seed) for arm in (WITHOUT, INSERTED) for factor in config.factors for seed in (0, 1)
    ]
    ends = [training.accuracy for training in result.trainings]
    assert [run.accuracies[0] for run in result.runs] == ends * 6
    assert result.max_error < 1e-4
