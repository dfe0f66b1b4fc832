"""What came out of `insertion`, in words, a table and a figure."""

from __future__ import annotations

import dataclasses

from ..report import Curve, LinePlot, Page, Panels, Table
from ._insertion_record import FineTuning, Insertion

CLAIM = (
    "Batch norm inserted into a network trained without it leaves its outputs as they are, and lets it be fine-tuned "
    "at higher learning rates, to a higher accuracy in the same number of steps."
)
_NAMES = {"without": "without batch norm", "with": "batch norm inserted"}


def page_of(result: Insertion, command: str = "") -> Page:
    """The result as a report."""
    return Page(
        title="Batch norm inserted into a trained VGG-11",
        claim=CLAIM,
        summary=summary(result),
        tables=[_table(result)],
        figures=[figure(result)],
        configuration=dataclasses.asdict(result.config),
        command=command,
    )


def summary(result: Insertion) -> list[str]:
    """The answer in sentences."""
    start = result.runs[0].accuracies[0]
    best = max(result.trainings, key=lambda training: training.accuracy)
    without, inserted = (max(_of(result, arm), key=lambda run: run.final) for arm in ("without", "with"))
    noise = (inserted.final * (1 - inserted.final) / result.config.test_images) ** 0.5
    difference = inserted.final - without.final
    verdict = "higher" if difference > 2 * noise else "lower" if difference < -2 * noise else "no different"
    answer = f"With batch norm inserted, fine-tuning reaches {_best_words(inserted)}, without it {_best_words(without)}"
    return [
        f"{answer}: {verdict}{'' if verdict != 'no different' else ' beyond the noise'}.",
        f"Trained without batch norm, the network had {start:.1%} (best rate {best.rate:g}).",
        f"Insertion changed its outputs by {result.max_error:.0e} of the largest.",
        *(_at(result, factor) for factor in result.config.factors),
    ]


def _best_words(run: FineTuning) -> str:
    return f"{run.final:.1%} at {run.factor:g} times the best rate"


def _at(result: Insertion, factor: float) -> str:
    ends = {run.arm: _end(run) for run in result.runs if run.factor == factor}
    return f"At {factor:g} times the rate: {ends['with']} with, {ends['without']} without."


def _end(run: FineTuning) -> str:
    return "diverged" if run.diverged else f"{run.final:.1%}"


def _of(result: Insertion, arm: str) -> list[FineTuning]:
    return [run for run in result.runs if run.arm == arm]


def _table(result: Insertion) -> Table:
    factors = result.config.factors
    rows = [[_NAMES[arm], *map(_end, _of(result, arm))] for arm in _NAMES]
    title = f"Test accuracy after {result.config.fine_tuning_steps:,} steps of fine-tuning"
    return Table(title, ["", *(f"{factor:g} × best rate" for factor in factors)], rows)


def figure(result: Insertion) -> Panels:
    """Accuracy against steps, a panel for each rate."""
    highest = max(accuracy for run in result.runs for accuracy in run.accuracies)
    plots = [
        LinePlot(
            f"{factor:g} × the best rate",
            "steps",
            "test accuracy",
            [_curve(run, result) for run in result.runs if run.factor == factor],
            ylim=(0.0, highest * 1.05),
            percent=True,
        )
        for factor in result.config.factors
    ]
    return Panels("insertion", "Fine-tuning a VGG-11 trained without batch norm", plots)


def _curve(run: FineTuning, result: Insertion) -> Curve:
    config = result.config
    steps = [min(i * config.eval_every, config.fine_tuning_steps) for i in range(len(run.accuracies))]
    label = _NAMES[run.arm] + (" (diverged)" if run.diverged else "")
    return Curve(label, steps, run.accuracies, color=list(_NAMES).index(run.arm))
