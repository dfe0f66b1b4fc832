"""Side-by-side timing: the cases take turns in one process, so a drift of the machine meets them all."""

from __future__ import annotations

import csv
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bnkit._environment import describe_machine
from bnkit._files import written_aside

RESULTS = Path(__file__).parent / "results"


def take_turns(
    cases: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 2, *, repeats: int = 1, device: str = "cpu"
) -> dict[str, list[float]]:
    """Seconds of each case in each round, of `repeats` calls on average.

    The order is drawn anew for two rounds, and reversed in the second: what a case finds in the caches is left there by
    the one before it, which has to be each of them alike.
    """
    chance, order = random.Random(0), list(cases)
    times: dict[str, list[float]] = {name: [] for name in order}
    clock = _cuda_seconds if device == "cuda" else _seconds
    for i in range(warm_up + rounds):
        if i % 2:
            order.reverse()
        else:
            chance.shuffle(order)
        for name in order:
            seconds = clock(cases[name], repeats) / repeats
            if i >= warm_up:
                times[name].append(seconds)
    return times


def _seconds(case: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        case()
    return time.perf_counter() - start


def _cuda_seconds(case: Callable[[], object], repeats: int) -> float:
    """Between two events in the stream, so the device's own time."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        case()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """p20, p50 and p80."""
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return cuts[1], statistics.median(values), cuts[7]


def in_fresh_process(script: str, *arguments: str) -> Any:
    """Run a benchmark script in a process of its own, for a setting that can't be undone; its last line is JSON."""
    done = subprocess.run([sys.executable, script, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def save_results(name: str, rows: Sequence[Mapping[str, object]]) -> Path:
    """Write `results/<name>.csv`, each row with the machine and versions."""
    machine = {key: value for key, value in describe_machine().items() if key not in rows[0]}
    full = [{**row, **machine} for row in rows]
    path = RESULTS / f"{name}.csv"
    with written_aside(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(full[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(full)
    return path


def saved_rows(name: str, fields: Sequence[str]) -> dict[str, dict[str, object]]:
    """The rows of `results/<name>.csv` by the first of these fields, with these fields alone; none without the file."""
    path = RESULTS / f"{name}.csv"
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        return {old[fields[0]]: {key: old[key] for key in fields} for old in csv.DictReader(file)}


def save_row(name: str, row: Mapping[str, object]) -> None:
    """Put a row into `results/<name>.csv`, in place of the one with the same first field; the others stay, sorted."""
    fields = list(row)
    rows = saved_rows(name, fields) | {str(row[fields[0]]): dict(row)}
    save_results(name, [rows[key] for key in sorted(rows)])
