"""Inference with batch norms folded, against the same network as it is, folded by torch.fx, and under torch.compile.

Networks of torchvision and timm without weights, in eval mode, on batches of 1 and of 32 images of 128×128, float32,
contiguous, under `bnkit.tune_allocator()`. All sides of a row take turns in one process, and each network has a process
of its own. Every side's outputs are held against those of the network as it is before anything is timed.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from typing import Any

import torch
from _harness import in_fresh_process, quantiles, save_results, take_turns
from _surgery_models import made, settle
from _surgery_speed import folded_by_fx
from rich.console import Console

from bnkit import fold
from bnkit._allocator import tune_allocator
from bnkit.report import Table, print_table
from bnkit.surgery._verify import relative_error

NETS = (
    "torchvision:resnet18",
    "torchvision:resnet50",
    "torchvision:densenet121",
    "torchvision:mobilenet_v3_small",
    "torchvision:regnet_y_400mf",
    "timm:tf_efficientnet_b0",
)
BATCHES, SIDE = (1, 32), 128


@torch.no_grad()
def measure(name: str, rounds: int, compile_too: bool) -> list[dict[str, Any]]:
    """A row for each batch size and side, with the ratio of the unfolded network's time to its own."""
    tune_allocator()
    warnings.filterwarnings("ignore")
    model = made(name)
    settle(model, torch.randn(8, 3, SIDE, SIDE), None)
    folded = fold(model, torch.randn(2, 3, SIDE, SIDE), tolerance=1e-3).model
    sides: dict[str, Any] = {"as it is": model, "bnkit.fold": folded, "torch.fx fuse": folded_by_fx(model)}
    if compile_too:
        sides |= {"torch.compile": torch.compile(model), "bnkit.fold, torch.compile": torch.compile(folded)}
    rows = []
    for batch in BATCHES:
        x = torch.randn(batch, 3, SIDE, SIDE)
        cases: dict[str, Callable[[], object]] = {}
        for side, network in sides.items():
            if network is not None and relative_error(network(x), model(x)) < 1e-3:
                cases[side] = lambda network=network, x=x: network(x)
        times = take_turns(cases, rounds, repeats=8 if batch == 1 else 1)
        for side in sides:
            low, middle, high = (round(1e3 * v, 2) for v in quantiles(times[side])) if side in times else (None,) * 3
            ratios = [a / b for a, b in zip(times["as it is"], times.get(side, []), strict=False)]
            ratio = round(quantiles(ratios)[1], 2) if ratios else None
            row = {"network": name, "batch": batch, "side": side, "ms_p20": low, "ms_p50": middle, "ms_p80": high}
            rows.append({**row, "speed_up": ratio, "rounds": rounds})
    return rows


def main(rounds: int = 11, save: bool = False, compile_too: bool = True) -> None:
    """Measure each network in a process of its own, print the table, and keep it if asked."""
    console, rows = Console(), []
    for name in NETS:
        flags = [] if compile_too else ["--no-compile"]
        rows += in_fresh_process(__file__, "--measure", name, "--rounds", str(rounds), *flags)
    cells = [
        [
            row["network"],
            str(row["batch"]),
            row["side"],
            f"{row['ms_p50']} ({row['ms_p20']} to {row['ms_p80']})" if row["ms_p50"] else "fails",
            f"{row['speed_up']:.2f}" if row["speed_up"] else "–",
        ]
        for row in rows
    ]
    columns = ["network", "batch", "side", "ms, median (p20 to p80)", "times as it is"]
    print_table(Table("Inference on folded networks", columns, cells, f"{rounds} rounds, taking turns."), console)
    if save:
        console.print(f"Saved {save_results('fold', rows)}.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", choices=NETS)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out: it takes most of the time")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/fold.csv")
    given = parser.parse_args()
    if given.measure is None:
        main(given.rounds, given.save, not given.no_compile)
    else:
        print(json.dumps(measure(given.measure, given.rounds, not given.no_compile)))
