"""The insertion experiment: it runs, and its words follow the numbers."""

from __future__ import annotations

import pytest
import torch

from bnkit.data import ImageSet
from bnkit.experiments import insertion as experiment
from bnkit.experiments._insertion_page import figure, summary


def found(**accuracies: list[float]) -> experiment.Insertion:
    config = experiment.InsertionConfig(factors=(1.0,), fine_tuning_steps=60, eval_every=30)
    runs = [experiment.FineTuning(arm, 1.0, 0.1, values, len(values) < 3) for arm, values in accuracies.items()]
    return experiment.Insertion(config, [experiment.Training(0.1, 0.5)], runs, 1e-7)


@pytest.mark.parametrize(("ends", "word"), [((0.5, 0.7), "higher."), ((0.7, 0.5), "lower."),
                                            ((0.6, 0.61), "no different beyond the noise.")])  # fmt: skip
def test_words_follow_the_numbers(ends, word):
    result = found(without=[0.5, 0.5, ends[0]], **{"with": [0.5, 0.5, ends[1]]})
    assert summary(result)[0].endswith(word)


def test_a_divergence_is_told_and_drawn():
    result = found(without=[0.5], **{"with": [0.5, 0.6, 0.7]})
    assert summary(result)[-1] == "At 1 times the rate: 70.0% with, diverged without."
    (plot,) = figure(result).plots
    assert [curve.label for curve in plot.curves] == ["without batch norm (diverged)", "batch norm inserted"]
    assert list(plot.curves[1].x) == [0, 30, 60]


def test_every_arm_starts_where_the_training_ended():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(80) % 2
    pixels = (torch.randint(0, 128, (80, 1, 32, 32), generator=generator) + 127 * labels.view(-1, 1, 1, 1)).byte()
    images = ImageSet("two", pixels, labels, pixels[:40], labels[:40], ("dark", "light"))
    config = experiment.InsertionConfig(
        width=2, steps=4, rates=(0.01,), fine_tuning_steps=4, batch_size=8, calibration_images=40, test_images=20,
        eval_every=2,
    )  # fmt: skip
    result = experiment.fine_tune(images, config)
    assert [(run.arm, run.factor) for run in result.runs] == [
        (arm, factor) for factor in config.factors for arm in ("without", "with")
    ]
    assert {run.accuracies[0] for run in result.runs} == {result.trainings[0].accuracy}
    assert result.max_error < 1e-4
    assert experiment.page_of(result).tables[0].rows[0][0] == "without batch norm"
