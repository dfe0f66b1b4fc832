"""What came out of `insertion`, in words, a table and a figure."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence

from ..report import Curve, LinePlot, Page, Panels
from ._insertion_record import INSERTED, ORIGINAL, WITHOUT, Insertion, Run
from ._trials import Outcome, accuracy_table, best_of, relation

_ARMS = (WITHOUT, INSERTED)
CLAIM = (
    "Batch norm inserted into a network trained without it leaves its outputs as they are, and lets it be fine-tuned "
    "at higher learning rates, to a higher accuracy in the same number of steps."
)


def page_of(result: Insertion, command: str = "") -> Page:
    """The result as a report."""
    note = "mean ± standard deviation over seeds"
    caption = f"Test accuracy after {result.config.fine_tuning_steps:,} steps of fine-tuning ({note})"
    return Page(
        title="Batch norm inserted into a trained VGG-11",
        claim=CLAIM,
        summary=summary(result),
        tables=[
            accuracy_table(result.trainings, f"Test accuracy after {result.config.steps:,} steps without batch norm"),
            accuracy_table(result.runs, caption),
        ],
        figures=[figure(result)],
        configuration=dataclasses.asdict(result.config),
        command=command,
    )


def summary(result: Insertion) -> list[str]:
    """The answer in sentences."""
    start, without, inserted = _start(result), best_of(result.runs, WITHOUT), best_of(result.runs, INSERTED)
    return [
        f"Trained without batch norm, the network has {start} at its best rate, {start.rate:g}.",
        f"With batch norm inserted, fine-tuning brings it to {inserted} at {inserted.rate / start.rate:g} times that "
        f"rate, {relation(inserted, without)} than without: {without} at {without.rate / start.rate:g} times.",
        f"Insertion changed its outputs by {result.max_error:.0e} of the largest.",
    ]


def _start(result: Insertion) -> Outcome:
    return best_of(result.trainings, ORIGINAL)


def figure(result: Insertion) -> Panels:
    """Mean accuracy over seeds against steps, a panel for each rate."""
    highest = max(accuracy for run in result.runs for accuracy in run.accuracies)
    best = _start(result).rate
    plots = [
        LinePlot(
            f"{rate / best:g} × the best rate",
            "steps",
            "test accuracy",
            [_curve([run for run in result.runs if (run.arm, run.rate) == (arm, rate)], result) for arm in _ARMS],
            ylim=(0.0, highest * 1.05),
            percent=True,
        )
        for rate in dict.fromkeys(run.rate for run in result.runs)
    ]
    return Panels("insertion", "Fine-tuning a VGG-11 trained without batch norm", plots)


def _curve(runs: Sequence[Run], result: Insertion) -> Curve:
    """As far as all of them came."""
    config = result.config
    accuracies = list(zip(*(run.accuracies for run in runs), strict=False))
    steps = [min(i * config.eval_every, config.fine_tuning_steps) for i in range(len(accuracies))]
    diverged = any(math.isnan(run.accuracy) for run in runs)
    return Curve(
        runs[0].arm + (" (diverged)" if diverged else ""),
        steps,
        [statistics.fmean(values) for values in accuracies],
        low=[min(values) for values in accuracies],
        high=[max(values) for values in accuracies],
        color=_ARMS.index(runs[0].arm),
    )
