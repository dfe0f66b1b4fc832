"""A comparison in words, tables and figures."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from ..report import Curve, HeatMap, LinePlot, Page, Panels, Plot
from ._compare_words import summary, tables
from ._grid import Grid
from ._record import NetRecord, drift, label_of, typical_unit
from .compare import Comparison

CLAIM = (
    "Batch normalization lets a network train faster and to a higher test accuracy, and keeps the inputs of its last "
    "nonlinearity stable (Ioffe and Szegedy 2015, section 4.1, figure 1)."
)


def page_of(result: Comparison, command: str) -> Page:
    """The report of a comparison."""
    settings = {**dataclasses.asdict(result.config), "learning_rate": f"{result.config.rate:g}"}
    return Page(
        title=f"What batch normalization buys: {result.config.model} on {result.config.data}",
        claim=CLAIM,
        summary=summary(result),
        tables=tables(result),
        figures=figures(result),
        configuration=settings,
        environment={**result.environment, "seconds for the whole job": f"{result.seconds:.0f}"},
        partial=result.partial,
        command=command,
    )


def figures(result: Comparison) -> list[Panels]:
    """Accuracy, activations and the grid: those that were measured."""
    shown = [_accuracy(result)] if any(record.steps for record in result.records) else []
    if result.protocol and all(record.percentiles for record in result.protocol):
        shown.append(_activations(result.protocol))
    if result.grid and result.grid.steps:
        shown.append(_heat_maps(result.grid))
    return shown


def _accuracy(result: Comparison) -> Panels:
    groups = [("One learning rate for all", result.protocol), ("Each at its own best", result.tuned)]
    plots = [_accuracy_plot(title, records) for title, records in groups if records]
    return Panels(
        "accuracy",
        "Test accuracy over training",
        plots,
        caption="The paper's figure 1a"
        + (", and the same for each network's own best settings." if result.tuned else "."),
    )


def _accuracy_plot(title: str, records: Sequence[NetRecord]) -> LinePlot:
    curves = []
    for i, record in enumerate(records):
        values = np.array(record.accuracy, dtype=float).reshape(len(record.steps), len(record.seeds))
        mean = values.mean(1)
        spread = values.std(1, ddof=1) if len(record.seeds) > 1 else None
        low, high = (None, None) if spread is None else ((mean - spread).tolist(), (mean + spread).tolist())
        curves.append(Curve(label_of(record.configuration.norm), record.steps, mean.tolist(), low, high, color=i))
    settings = "; ".join(f"{label_of(r.configuration.norm)}: {_settings(r)}" for r in records)
    return LinePlot(title, "steps", "test accuracy", curves, note=settings, percent=True, ylim=_focus(curves))


def _settings(record: NetRecord) -> str:
    configuration = record.configuration
    std = "" if configuration.init_std is None else f", init std {configuration.init_std:g}"
    return f"rate {configuration.learning_rate:g}{std}"


def _focus(curves: Sequence[Curve]) -> tuple[float, float] | None:
    """The paper's axis, 0.7 to 1, where every curve ends above it; the whole range otherwise."""
    ends = [y for curve in curves for y in curve.y[-1:]]
    return (0.7, 1.0) if ends and min(ends) > 0.75 else None


def _activations(records: Sequence[NetRecord]) -> Panels:
    plots = [_percentile_plot(record, i) for i, record in enumerate(records)]
    drifts = [
        Curve(
            label_of(record.configuration.norm), steps, np.median(drift(record.percentiles), axis=1).tolist(), color=i
        )
        for i, record in enumerate(records)
        for steps in [record.steps[: len(record.percentiles)]]
    ]
    plots.append(
        LinePlot(
            "Drift, median over all units",
            "steps",
            "distance from the final distribution",
            drifts,
            note="1 is the width of the final distribution, from its 15th to its 85th percentile.",
        )
    )
    return Panels(
        "activations",
        "Inputs of the last hidden layer's nonlinearity",
        plots,
        caption="The paper's figures 1b and 1c: the 15th, 50th and 85th percentile over test images of one typical "
        "unit (the one with the median drift), and the median drift of all units. First seed, one rate for all.",
    )


def _percentile_plot(record: NetRecord, color: int) -> LinePlot:
    values = np.stack(record.percentiles)[:, typical_unit(record.percentiles)]
    low, middle, high = values.T.tolist()
    label = label_of(record.configuration.norm)
    steps = record.steps[: len(middle)]
    curve = Curve("median, and 15th to 85th percentile", steps, middle, low, high, color=color)
    return LinePlot(f"One unit {label}", "steps", "input", [curve])


def _heat_maps(grid: Grid) -> Panels:
    plots: list[Plot] = [
        HeatMap(
            label_of(norm)[0].upper() + label_of(norm)[1:],
            "learning rate",
            "initial standard deviation",
            [f"{rate:g}" for rate in grid.rates],
            [f"{std:g}" for std in grid.init_stds],
            values.tolist(),
            low=0.0,
            high=1.0,
            best=grid.best(norm),
        )
        for norm, values in zip(grid.norms, grid.accuracy, strict=True)
    ]
    return Panels(
        "grid",
        f"Accuracy after {grid.steps:,} steps",
        plots,
        caption=f"Every learning rate with every scale of the Gaussian initial weights, on {grid.held_out:,} held-out "
        "training images. The outlined cell is the network's own best.",
    )
