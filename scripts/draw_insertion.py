"""Make the docs' figure from what `bnkit reproduce insertion --data cifar10-jpeg.zip --json` printed.

    python scripts/draw_insertion.py benchmarks/results/reproduce_insertion.json

writes `docs/insertion.svg`.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from bnkit.experiments._insertion_page import figure
from bnkit.experiments.insertion import Insertion, InsertionConfig, Run
from bnkit.report import save_svg

ROOT = Path(__file__).parents[1]


def main(path: str) -> None:
    """Read the file and write the figure."""
    found = json.loads(Path(path).read_text(encoding="utf-8"))
    config: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in found["config"].items()}
    trainings, runs = ([_run(run) for run in found[key]] for key in ("trainings", "runs"))
    result = Insertion(InsertionConfig(**config), trainings, runs, found["max_error"])
    save_svg(figure(result), ROOT / "docs/insertion.svg")


def _run(values: dict[str, Any]) -> Run:
    """JSON has no NaN, and null in its place."""
    numbers: dict[str, Any] = {key: math.nan if value is None else value for key, value in values.items()}
    return Run(**numbers)


if __name__ == "__main__":
    main(sys.argv[1])
