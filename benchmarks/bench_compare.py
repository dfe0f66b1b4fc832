"""Steps a second of `bnkit compare --quick` against a plain PyTorch loop of the same two networks.

Both train the network of Ioffe and Szegedy 2015, section 4.1, without and with batch normalization, in mini-batches of
60. The plain loop is what most people write first: `nn.Linear`, `nn.BatchNorm1d`, `torch.optim.SGD`, and a `DataLoader`
over a `TensorDataset`. Each side runs with the C library's default allocator and with `bnkit.tune_allocator()`.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import sys
from collections.abc import Callable, Iterator

import torch
from _harness import in_fresh_process, quantiles, save_results, take_turns
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bnkit._allocator import tune_allocator
from bnkit.data import ImageSet, load
from bnkit.experiments._lockstep import Training, create_stacks
from bnkit.experiments._record import Configuration
from bnkit.experiments._side_by_side import side_by_side
from bnkit.experiments._task import Task
from bnkit.report import Table, print_table

BATCH, RATE, STD = 60, 0.5, 0.01
STEPS = 200


def plain_network(norm: bool) -> nn.Sequential:
    """784-100-100-100-10 of sigmoids."""
    layers: list[nn.Module] = []
    for width in (784, 100, 100):
        layers += [nn.Linear(width, 100, bias=not norm), *([nn.BatchNorm1d(100)] if norm else []), nn.Sigmoid()]
    return nn.Sequential(*layers, nn.Linear(100, 10))


def plain(data: ImageSet, norm: bool) -> Callable[[], None]:
    """`STEPS` steps of the plain loop."""
    model = plain_network(norm)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    loader = DataLoader(
        TensorDataset(data.train_images.flatten(1) / 255, data.train_labels), batch_size=BATCH, shuffle=True
    )
    batches: Iterator[list[torch.Tensor]] = itertools.chain.from_iterable(itertools.repeat(loader))

    def run() -> None:
        for _ in range(STEPS):
            x, y = next(batches)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()

    return run


@contextlib.contextmanager
def in_lockstep(data: ImageSet) -> Iterator[Callable[[], object]]:
    """`STEPS` steps of both networks as `bnkit compare` trains them."""
    task = Task.of(data, torch.device("cpu"))
    stacks = create_stacks([Configuration("none", RATE, STD), Configuration("batch", RATE, STD)], [0], data, task)
    trainings = [Training(stack, task, [0], BATCH) for stack in stacks]
    with side_by_side([training.run for training in trainings]) as run:
        goals = itertools.count(STEPS, STEPS)
        yield lambda: run(next(goals))


def measure(allocator: str, rounds: int) -> list[dict[str, object]]:
    """A row a side: microseconds a step of both networks together."""
    if allocator == "tuned":
        tune_allocator()
    data = load("digits")
    with in_lockstep(data) as lockstep:
        cases = {
            "plain without BN": plain(data, False),
            "plain with BN": plain(data, True),
            "bnkit compare": lockstep,
        }
        times = take_turns(cases, rounds)
    both = [a + b for a, b in zip(times["plain without BN"], times["plain with BN"], strict=True)]
    rows = []
    for side, values in (("plain PyTorch", both), ("bnkit compare", times["bnkit compare"])):
        low, middle, high = (1e6 * value / STEPS for value in quantiles(values))
        ratios = [a / b for a, b in zip(both, values, strict=True)]
        rows.append(
            {
                "side": side,
                "allocator": allocator,
                "us_per_step_p20": round(low, 1),
                "us_per_step_p50": round(middle, 1),
                "us_per_step_p80": round(high, 1),
                "speed_up": round(quantiles(ratios)[1], 2),
                "rounds": rounds,
                "steps_per_round": STEPS,
            }
        )
    return rows


def main(rounds: int = 15, save: bool = False) -> None:
    """Measure with both allocators, print the table, and keep it if asked."""
    rows = [
        row
        for allocator in ("default", "tuned")
        for row in in_fresh_process(__file__, "--measure", allocator, "--rounds", str(rounds))
    ]
    cells = [
        [
            str(row["side"]),
            str(row["allocator"]),
            f"{row['us_per_step_p50']} ({row['us_per_step_p20']} to {row['us_per_step_p80']})",
            f"{1e6 / row['us_per_step_p50']:,.0f}",
            f"{row['speed_up']:.2f}",
        ]
        for row in rows
    ]
    columns = ["side", "allocator", "µs a step, median (p20 to p80)", "steps/s", "times plain"]
    note = f"One step trains both networks. Median of {rounds} rounds of {STEPS} steps, taking turns in one process."
    console = Console()
    print_table(Table("Training the two networks of the BN paper's section 4.1", columns, cells, note), console)
    if save:
        console.print(f"Saved {save_results('compare', rows)}.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", choices=("default", "tuned"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/compare.csv")
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.rounds)))
        sys.exit()
    main(arguments.rounds, arguments.save)
