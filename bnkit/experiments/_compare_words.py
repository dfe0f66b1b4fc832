"""A comparison's tables, and what they say in plain words."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..report import Table
from ._grid import Grid
from ._record import NetRecord, label_of, mean_and_spread
from .compare import Comparison

GOALS = (0.95, 0.96, 0.97, 0.98)


def tables(result: Comparison) -> list[Table]:
    """For each group of networks what they reached and when, and the speed-up over the first of them."""
    made = []
    for title, records in (("One learning rate for all", result.protocol), ("Each at its own best", result.tuned)):
        if any(record.accuracy for record in records):
            made.append(_reached(title, records))
            made += [_speed_up(title, records[0], record) for record in records[1:]]
    return made


def _reached(title: str, records: Sequence[NetRecord]) -> Table:
    columns = ["network", "rate", "init std", "best %", "final %"]
    columns += [f"steps (s) to {goal:.0%}" for goal in GOALS] + ["steps (s) to the other's best"]
    note = "Test accuracy. In brackets the training seconds of one network by itself, evaluation excluded."
    if len(records[0].seeds) > 1:
        note += f" Mean ± sample standard deviation over {len(records[0].seeds)} seeds."
    divergences = [sentence for record in records for sentence in _divergences(record)]
    return Table(title, columns, [_row(record, records) for record in records], " ".join([note, *divergences]))


def _row(record: NetRecord, records: Sequence[NetRecord]) -> list[str]:
    configuration = record.configuration
    others = [other for other in records if other is not record]
    rival = max(others, key=lambda other: np.mean(other.best()), default=None)
    return [
        label_of(configuration.norm),
        f"{configuration.learning_rate:g}",
        "model's own" if configuration.init_std is None else f"{configuration.init_std:g}",
        _mean(record.best(), ".2f", 100),
        _mean(record.final(), ".2f", 100),
        *(_when(record, [goal] * len(record.seeds)) for goal in GOALS),
        "–" if rival is None else _when(record, rival.best()),
    ]


def _when(record: NetRecord, goals: Sequence[float]) -> str:
    steps = record.steps_to(goals)
    if not any(map(math.isfinite, steps)):
        return "never"
    return f"{_mean(steps, ',.0f')} ({_mean([record.seconds_at(step) for step in steps], '.1f')})"


def _mean(values: Sequence[float], form: str, scale: float = 1.0) -> str:
    """`mean ± spread` of the finite values, and of how many if not of all."""
    finite = [value * scale for value in values if math.isfinite(value)]
    if not finite:
        return "never"
    mean, spread = mean_and_spread(finite)
    text = format(mean, form) if math.isnan(spread) else f"{mean:{form}} ± {spread:{form}}"
    return text if len(finite) == len(values) else f"{text}, {len(finite)} of {len(values)} seeds"


def _divergences(record: NetRecord) -> list[str]:
    return [
        f"{label_of(record.configuration.norm)}, seed {seed}: stopped at step {step}, where the loss was no longer "
        f"finite at rate {record.configuration.learning_rate:g}; try a lower rate."
        for seed, step in record.diverged.items()
    ]


def speed_up(slow: NetRecord, fast: NetRecord, goals: Sequence[float]) -> tuple[list[float], list[float]]:
    """How many times fewer steps, and seconds, `fast` needs to reach `goals`; one value a seed, NaN if either never."""
    pairs = list(zip(slow.steps_to(goals), fast.steps_to(goals), strict=True))
    # A goal reached before the first step can't be reached sooner by a factor.
    both = [(a, b) if math.isfinite(a + b) and a * b > 0 else None for a, b in pairs]
    steps = [pair[0] / pair[1] if pair else math.nan for pair in both]
    seconds = [slow.seconds_at(pair[0]) / fast.seconds_at(pair[1]) if pair else math.nan for pair in both]
    return steps, seconds


def _speed_up(title: str, slow: NetRecord, fast: NetRecord) -> Table:
    first, second = label_of(slow.configuration.norm), label_of(fast.configuration.norm)
    goals = [[goal] * len(slow.seeds) for goal in GOALS] + [slow.best()]
    pairs = [speed_up(slow, fast, goal) for goal in goals]
    rows = [[what, *(_mean(pair[i], ".2f") for pair in pairs)] for i, what in enumerate(("steps", "seconds"))]
    rows = [[cell.replace("never", "–") for cell in row] for row in rows]
    columns = ["speed-up in", *(f"to {goal:.0%}" for goal in GOALS), f"to the best {first}"]
    note = f"{first} / {second}: 2 means that the network {second} needs half. – where either never got there, or was "
    note += "there untrained."
    return Table(f"{title}: speed-up {second}", columns, rows, note)


def summary(result: Comparison) -> list[str]:
    """Plain sentences, drawn from the numbers whichever way they fall."""
    sentences = []
    if any(record.accuracy for record in result.protocol):
        sentences += [_versus(result.protocol[0], other, "At one learning rate") for other in result.protocol[1:]]
    if any(record.accuracy for record in result.tuned):
        sentences += [_versus(result.tuned[0], other, "Each at its own best settings") for other in result.tuned[1:]]
    if result.grid and result.grid.steps:
        sentences.append(_tolerance(result.grid))
    if not sentences:
        sentences.append("Nothing was measured before the run ended.")
    if result.skipped:
        count = len(result.skipped)
        sentences.append(f"{count} {'image' if count == 1 else 'images'} could not be read and took no part.")
    return sentences


def _versus(base: NetRecord, other: NetRecord, circumstances: str) -> str:
    first, second = (label_of(record.configuration.norm) for record in (base, other))
    return (
        f"{circumstances} ({_settings(base, other)}), the network {second} {_sooner(base, other)}; "
        f"its best is {_mean(other.best(), '.2f', 100)}%, against {_mean(base.best(), '.2f', 100)}% {first}."
    )


def _settings(base: NetRecord, other: NetRecord) -> str:
    texts = []
    for record in (base, other):
        c = record.configuration
        texts.append(f"rate {c.learning_rate:g}" + ("" if c.init_std is None else f", initial std {c.init_std:g}"))
    if texts[0] == texts[1]:
        return texts[0]
    labels = (label_of(record.configuration.norm) for record in (base, other))
    return "; ".join(f"{label}: {text}" for label, text in zip(labels, texts, strict=True))


def _sooner(base: NetRecord, other: NetRecord) -> str:
    """How the two compare in the steps to the best accuracy of `base`."""
    goal = f"the best accuracy {label_of(base.configuration.norm)}"
    reached = [step for step in other.steps_to(base.best()) if math.isfinite(step)]
    if len(reached) < len(base.seeds) / 2:
        return f"does not reach {goal}" if len(base.seeds) == 1 else f"does not reach {goal} on most seeds"
    if np.median(reached) == 0:
        return f"has {goal} before it is trained"
    ratio = float(np.nanmedian(speed_up(base, other, base.best())[0]))
    if 0.9 <= ratio <= 1.1:
        return f"needs about as many steps to reach {goal}"
    return (
        f"reaches {goal} in {ratio:.1f} times fewer steps"
        if ratio > 1
        else (f"needs {1 / ratio:.1f} times the steps to reach {goal}")
    )


def _tolerance(grid: Grid) -> str:
    shares = [f"{round(grid.share_above(n, 0.9) * grid.cells)} {label_of(n)}" for n in grid.norms]
    return (
        f"Of {grid.cells} pairs of learning rate and initial scale, {' and '.join(shares)} "
        f"reach 90% within {grid.steps:,} steps."
    )
