"""The report on models on corrupted images: tables, sentences and a figure, made from what was measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from ..report import Curve, LinePlot, Page, Panels, Table
from ._corrupt import STRENGTHS
from ._corruptions_record import Corruptions

CLAIM = (
    "Statistics measured on unlabelled corrupted images win back part of the lost accuracy, without training, and even "
    "with few images if they are blended with the source's (Schneider et al. 2020)."
)


def page_of(result: Corruptions, command: str = "") -> Page:
    """The result as a report."""
    return Page(
        title="Adapting to corrupted images by statistics alone",
        claim=CLAIM,
        summary=[_sentence(result, model) for model in result.models],
        tables=[*(_table(result, model) for model in result.models), _by_corruption(result)],
        figures=[figure(result)],
        configuration=dataclasses.asdict(result.config),
        command=command,
    )


def _best_weight(result: Corruptions, model: str, n: int) -> int:
    """The N of the highest mean accuracy with n images."""
    return max(result.config.source_weights, key=lambda weight: result.mean(model, n, weight))


def _best(result: Corruptions, model: str) -> tuple[int, int]:
    """The n and N of the highest mean accuracy."""
    pairs = [(n, _best_weight(result, model, n)) for n in result.config.sizes]
    return max(pairs, key=lambda pair: result.mean(model, *pair))


def _sentence(result: Corruptions, model: str) -> str:
    before, clean = result.mean(model, None, None), result.mean(model, None, None, "none")
    n, weight = _best(result, model)
    after, one = result.mean(model, n, weight), min(result.config.sizes)
    single = result.mean(model, one, _best_weight(result, model, one))
    verdict = "wins back" if after > before else "does not win back"
    return (
        f"{model}: {clean:.1%} as the images are, {before:.1%} corrupted; adaptation {verdict} accuracy: "
        f"{after:.1%} with n = {n}, N = {weight}, and at best {single:.1%} with n = {one}."
    )


def _table(result: Corruptions, model: str) -> Table:
    sizes = result.config.sizes
    rows = [
        [f"N = {weight}", *(f"{result.mean(model, n, weight):.1%}" for n in sizes)]
        for weight in result.config.source_weights
    ]
    note = (
        f"Before: {result.mean(model, None, None):.1%}. Not corrupted: {result.mean(model, None, None, 'none'):.1%}, "
        f"and {result.whole_set[model]:.2%} on all test images."
    )
    return Table(f"{model}: mean accuracy on corrupted images", ["", *(f"n = {n}" for n in sizes)], rows, note)


def _by_corruption(result: Corruptions) -> Table:
    """Each n with the N that is best for it on average."""
    rows = []
    for model in result.models:
        pairs: list[tuple[int | None, int | None]] = [(None, None)]
        pairs += [(n, _best_weight(result, model, n)) for n in result.config.sizes]
        for corruption in ("none", *STRENGTHS):
            accuracies = [result.mean(model, n, weight, corruption) for n, weight in pairs]
            rows.append([f"{model}, {corruption}", *(f"{accuracy:.1%}" for accuracy in accuracies)])
    columns = ["", "before", *(f"n = {n}" for n in result.config.sizes)]
    return Table("Mean over strengths, each n with the N best for it", columns, rows)


def figure(result: Corruptions, model: str | None = None) -> Panels:
    """Accuracy against strength, before and adapted, a panel a corruption; of the first model if None."""
    model = model or result.models[0]
    pairs = {_best(result, model), *((n, _best_weight(result, model, n)) for n in result.config.sizes[:2])}
    arms = {"as trained": (None, None)} | {f"n = {n}, N = {weight}": (n, weight) for n, weight in sorted(pairs)}
    plots = [_plot(result, model, corruption, arms) for corruption in STRENGTHS]
    return Panels("corruptions", f"{model} on corrupted images", plots, caption=_sentence(result, model))


def _plot(
    result: Corruptions, model: str, corruption: str, arms: Mapping[str, tuple[int | None, int | None]]
) -> LinePlot:
    strengths = [0, *result.config.strengths]
    curves = [
        Curve(label, strengths, [result.at(model, *pair, corruption, s) for s in strengths])
        for label, pair in arms.items()
    ]
    return LinePlot(corruption, "strength", "test accuracy", curves, percent=True)
