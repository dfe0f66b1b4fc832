"""Make the docs' figure from what `bnkit reproduce insertion --data cifar10-jpeg.zip --json` printed.

    python scripts/draw_insertion.py benchmarks/results/reproduce_insertion.json

writes `docs/insertion.svg`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from bnkit.experiments._insertion_page import figure
from bnkit.experiments.insertion import FineTuning, Insertion, InsertionConfig, Training
from bnkit.report import save_svg

ROOT = Path(__file__).parents[1]


def main(path: str) -> None:
    """Read the file and write the figure."""
    found = json.loads(Path(path).read_text(encoding="utf-8"))
    config: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in found["config"].items()}
    trainings = [Training(**training) for training in found["trainings"]]
    runs = [FineTuning(**run) for run in found["runs"]]
    result = Insertion(InsertionConfig(**config), trainings, runs, found["max_error"])
    save_svg(figure(result), ROOT / "docs/insertion.svg")


if __name__ == "__main__":
    main(sys.argv[1])
