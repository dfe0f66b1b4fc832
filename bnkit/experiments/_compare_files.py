"""The files of a comparison."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from pathlib import Path

from .._files import write_text
from ..report import save_page, save_svg
from ._compare_page import figures, page_of
from ._compare_words import GOALS
from .compare import Comparison


def save(result: Comparison, folder: Path, command: str) -> None:
    """Write `report.html`, the figures as SVG, `metrics.csv` and `run.json` into `folder`.

    Raises:
        UserError: the folder can't be written.
    """
    write_text(folder / "run.json", json.dumps(to_dict(result, command), indent=2, allow_nan=False) + "\n")
    write_text(folder / "metrics.csv", _csv(result))
    for panels in figures(result):
        save_svg(panels, folder / f"{panels.name}.svg")
    save_page(page_of(result, command), folder / "report.html")


def _csv(result: Comparison) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    columns = ["network", "norm", "learning_rate", "init_std", "seed", "step", "seconds", "test_accuracy", "test_loss"]
    writer.writerow(columns)
    for record in result.records:
        configuration = [record.label, *dataclasses.astuple(record.configuration)]
        for step, seconds, accuracies, losses in zip(
            record.steps, record.seconds, record.accuracy, record.loss, strict=True
        ):
            for seed, accuracy, loss in zip(record.seeds, accuracies, losses, strict=True):
                writer.writerow([*configuration, seed, step, f"{seconds:.4f}", f"{accuracy:.6f}", f"{loss:.6f}"])
    return out.getvalue()


def to_dict(result: Comparison, command: str) -> dict[str, object]:
    """All that is needed to repeat the comparison and to read its outcome; infinity and NaN are null."""
    grid = result.grid
    return {
        "command": command,
        "config": {**dataclasses.asdict(result.config), "learning_rate": result.config.rate},
        "environment": dict(result.environment),
        "partial": result.partial,
        "skipped": list(result.skipped),
        "seconds": round(result.seconds, 2),
        "networks": [
            {
                "network": record.label,
                **dataclasses.asdict(record.configuration),
                "seeds": list(record.seeds),
                "best_accuracy": _finite(record.best()),
                "final_accuracy": _finite(record.final()),
                "steps_to": {f"{goal:g}": _finite(record.steps_to([goal] * len(record.seeds))) for goal in GOALS},
                "diverged": record.diverged,
            }
            for record in result.records
        ],
        "grid": grid
        and {
            "norms": list(grid.norms),
            "learning_rates": list(grid.rates),
            "init_stds": list(grid.init_stds),
            "steps": grid.steps,
            "held_out": grid.held_out,
            "accuracy": [[_finite(row) for row in rows] for rows in grid.accuracy.tolist()],
        },
    }


def _finite(values: list[float]) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values]
