"""Make the docs' figure and table of results from what `bnkit reproduce corruptions --out FOLDER` wrote.

    python scripts/draw_corruptions.py FOLDER/run.json

writes `benchmarks/results/corruptions.csv` and `docs/corruptions.svg`.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

from bnkit.experiments._corruptions_page import figure
from bnkit.experiments.corruptions import Corruptions, CorruptionsConfig, Measured
from bnkit.report import save_svg

ROOT = Path(__file__).parents[1]


def main(path: str) -> None:
    """Read `run.json` and write both files."""
    found = json.loads(Path(path).read_text(encoding="utf-8"))
    config: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in found["config"].items()
    }
    measured = [Measured(**row) for row in found["measured"]]
    save_svg(
        figure(Corruptions(CorruptionsConfig(**config), found["whole_set"], measured)), ROOT / "docs/corruptions.svg"
    )
    rows = [{**row, "accuracy": round(row["accuracy"], 5), **found["environment"]} for row in found["measured"]]
    with (ROOT / "benchmarks/results/corruptions.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main(sys.argv[1])
