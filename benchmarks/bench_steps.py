"""A training step of whole networks: plain PyTorch against bnkit's layers, each eager and under `torch.compile`.

ResNet-20 on 128 images of 32×32 and ResNet-18 on 32 of 128×128; float32 and bfloat16 autocast, contiguous and
channels_last. A step is forward, cross-entropy, backward and SGD with momentum. The plain networks are torchvision's,
or bnkit's with `torch.nn.BatchNorm2d`, in-place ReLUs and additions of their own. Everything in a network's row takes
turns in one process under `bnkit.tune_allocator()`; the recipe, which `bnkit train` picks, is held against the plain
eager step in float32 and contiguous, and that step is also timed under the default allocator.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable
from typing import Any

import torch
from _harness import in_fresh_process, quantiles, save_results, take_turns
from rich.console import Console
from torch import nn
from torch.nn import functional as F

from bnkit import models
from bnkit._allocator import tune_allocator
from bnkit.report import Table, print_table
from bnkit.train import fast_precision

NETS = {"resnet20": (128, 32), "resnet18": (32, 128)}
SETTINGS = [(bf16, last) for bf16 in (False, True) for last in (False, True)]
COLUMNS = ("plain", "plain compiled", "bnkit", "bnkit compiled")


def plain_network(name: str) -> nn.Module:
    """The network as people write it."""
    if name == "resnet18":
        import torchvision

        return torchvision.models.resnet18(num_classes=10)
    return models.create(
        name, nn.BatchNorm2d, num_classes=10, activation=functools.partial(nn.ReLU, inplace=True), image_size=32
    )


def bnkit_network(name: str) -> nn.Module:
    """The same on bnkit's layers."""
    return models.create(name, num_classes=10, image_size=NETS[name][1])


def step_of(model: nn.Module, name: str, bf16: bool, channels_last: bool, compiled: bool) -> Callable[[], None]:
    """One training step of `model` on random images."""
    batch, side = NETS[name]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model.to(memory_format=layout)  # pyright: ignore[reportCallIssue]
    x = torch.randn(batch, 3, side, side).to(memory_format=layout)
    target = torch.randint(10, (batch,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=True)
    forward: Any = torch.compile(model) if compiled else model

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = F.cross_entropy(forward(x).float(), target)
        loss.backward()
        optimizer.step()

    return step


def cases_of(name: str, bf16: bool, channels_last: bool, compile_too: bool) -> dict[str, Callable[[], None]]:
    """The steps that take turns, by column."""
    found = {}
    for column in COLUMNS:
        compiled = column.endswith("compiled")
        if compile_too or not compiled:
            model = (plain_network if column.startswith("plain") else bnkit_network)(name)
            found[column] = step_of(model, name, bf16, channels_last, compiled)
    return found


def measure(name: str, bf16: bool, channels_last: bool, rounds: int, compile_too: bool) -> list[dict[str, Any]]:
    """A row a column, with the ratio of the plain eager step's time to its own."""
    tune_allocator()
    times = take_turns(cases_of(name, bf16, channels_last, compile_too), rounds)
    return _rows(name, "bf16" if bf16 else "float32", "channels_last" if channels_last else "contiguous", times)


def measure_recipe(name: str, rounds: int) -> list[dict[str, Any]]:
    """The plain eager step in float32 and contiguous, and what `bnkit train` picks."""
    tune_allocator()
    bf16 = fast_precision(torch.device("cpu")) == "bf16-mixed"
    cases = {
        "plain": step_of(plain_network(name), name, False, False, False),
        "recipe": step_of(bnkit_network(name), name, bf16, True, False),
    }
    chosen = f"{'bf16' if bf16 else 'float32'}, channels_last"
    return _rows(name, f"plain float32; recipe {chosen}", "plain contiguous", take_turns(cases, rounds))


def measure_default(name: str, rounds: int) -> list[dict[str, Any]]:
    """The plain eager step under the C library's default allocator."""
    times = take_turns({"plain": step_of(plain_network(name), name, False, False, False)}, rounds)
    return [{**row, "allocator": "default"} for row in _rows(name, "float32", "contiguous", times)]


def _rows(name: str, precision: str, layout: str, times: dict[str, list[float]]) -> list[dict[str, Any]]:
    rows = []
    for column, values in times.items():
        low, middle, high = (round(1e3 * value, 2) for value in quantiles(values))
        ratios = [a / b for a, b in zip(times["plain"], values, strict=True)]
        rows.append(
            {
                "network": name,
                "precision": precision,
                "layout": layout,
                "column": column,
                "allocator": "tuned",
                "ms_p20": low,
                "ms_p50": middle,
                "ms_p80": high,
                "times_plain": round(quantiles(ratios)[1], 2),
                "rounds": len(values),
            }
        )
    return rows


def main(rounds: int = 7, save: bool = False, compile_too: bool = True) -> None:
    """Measure each network's settings in a process of their own, print the table, and keep it if asked."""
    console = Console()
    rows: list[dict[str, Any]] = []
    for name in NETS:
        for bf16, last in SETTINGS:
            flags = ["--bf16"] * bf16 + ["--channels-last"] * last + ["--no-compile"] * (not compile_too)
            rows += in_fresh_process(__file__, "--measure", name, "--rounds", str(rounds), *flags)
        for kind in ("recipe", "default"):
            rows += in_fresh_process(__file__, "--measure", name, "--rounds", str(rounds), "--kind", kind)
    cells = [
        [
            row["network"],
            row["precision"],
            row["layout"],
            row["column"],
            row["allocator"],
            f"{row['ms_p50']} ({row['ms_p20']} to {row['ms_p80']})",
            f"{row['times_plain']:.2f}",
        ]
        for row in rows
    ]
    columns = ["network", "precision", "layout", "side", "allocator", "ms a step, median (p20 to p80)", "times plain"]
    print_table(Table("Training steps of whole networks", columns, cells, f"{rounds} rounds, taking turns."), console)
    if save:
        console.print(f"Saved {save_results('steps', rows)}.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", choices=tuple(NETS))
    parser.add_argument("--kind", choices=("steps", "recipe", "default"), default="steps")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out: it takes most of the time")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/steps.csv")
    given = parser.parse_args()
    if given.measure is None:
        main(given.rounds, given.save, not given.no_compile)
    elif given.kind == "steps":
        print(json.dumps(measure(given.measure, given.bf16, given.channels_last, given.rounds, not given.no_compile)))
    else:
        found = (measure_recipe if given.kind == "recipe" else measure_default)(given.measure, given.rounds)
        print(json.dumps(found))
