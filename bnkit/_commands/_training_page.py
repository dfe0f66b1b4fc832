"""A training run as a page and as a table of its evaluations."""

from __future__ import annotations

import csv
import dataclasses
import io
from typing import TYPE_CHECKING, Any

from ..report import Curve, LinePlot, Page, Panels, Table

if TYPE_CHECKING:
    from ..train import History


def page_of(run: dict[str, Any], history: History) -> Page:
    """The page of a run: its outcome in words, its curves, its evaluations, and what repeats it."""
    recipe, outcome = run["recipe"], run["outcome"]
    best, final = history.best, history.final
    model = recipe["model"] if recipe["norm"] is None else f"{recipe['model']} with norm {recipe['norm']}"
    sentence = (
        f"After {final.step:,} steps ({final.seconds:,.0f} s, {outcome['images_per_second']:,.0f} images a second) it "
        f"has {final.test_accuracy:.2%} of the test images right; its best was {best.test_accuracy:.2%}, after "
        f"{best.step:,} steps."
    )
    return Page(
        title=f"Training {model} on {recipe['data']}",
        claim="Test accuracy and loss of one run of mini-batch SGD.",
        summary=[sentence],
        tables=[_table(history)],
        figures=[_curves(history)],
        configuration={**recipe, **run["config"]},
        environment=run["environment"],
        partial=run["partial"],
        command=run["command"],
    )


def _table(history: History) -> Table:
    rows = [
        [
            f"{e.step:,}",
            f"{e.seconds:,.1f}",
            f"{e.learning_rate:.3g}",
            "" if e.train_loss is None else f"{e.train_loss:.4f}",
            f"{e.test_loss:.4f}",
            f"{e.test_accuracy:.2%}",
        ]
        for e in history.evaluations
    ]
    return Table("Evaluations", ["step", "seconds", "rate", "training loss", "test loss", "test accuracy"], rows)


def _curves(history: History) -> Panels:
    evaluations = history.evaluations
    steps = [e.step for e in evaluations]
    trained = [e for e in evaluations if e.train_loss is not None]
    losses = [
        Curve("training", [e.step for e in trained], [e.train_loss or 0.0 for e in trained]),
        Curve("test", steps, [e.test_loss for e in evaluations]),
    ]
    accuracy = Curve("test", steps, [e.test_accuracy for e in evaluations], color=1)
    return Panels(
        "curves",
        "Accuracy and loss",
        [
            LinePlot("Accuracy", "steps", "test accuracy", [accuracy], percent=True),
            LinePlot("Cross-entropy", "steps", "loss", losses),
        ],
        caption="The training loss is the mean over the batches since the evaluation before, in training mode and "
        "with augmentation; the test loss is measured in evaluation mode.",
    )


def csv_of(history: History) -> str:
    """The evaluations, a row each."""
    out = io.StringIO()
    rows = [dataclasses.asdict(evaluation) for evaluation in history.evaluations]
    writer = csv.DictWriter(out, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
