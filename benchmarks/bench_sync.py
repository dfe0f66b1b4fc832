"""What synchronized statistics cost: a model with two constants, measured here, and its predictions.

`python benchmarks/bench_sync.py` starts 1 to 4 processes on this machine, fits latency and bandwidth of gloo's two
collectives to two sizes on two ranks, and sets the model beside what a layer adds to batch norm for all other sizes.
`--table` prints what the model says for 1 to 4,096 ranks. docs/scaling.md explains both.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from _harness import save_results
from rich.console import Console
from torch.multiprocessing.spawn import spawn

from bnkit.nn import BatchNorm2d, SyncBatchNorm
from bnkit.report import Table, print_table

CHANNELS = (16, 256, 2048)
RESNET50 = (53, 26_560)  # layers, channels in all of them


@dataclass(frozen=True)
class Network:
    """Latency α of a message in seconds, and time β for a byte."""

    latency: float
    byte: float

    def forward(self, ranks: int, channels: int) -> float:
        """An all-gather around a ring, of 2 C + 2 numbers from each rank."""
        return (ranks - 1) * (self.latency + message(channels) * self.byte)

    def backward(self, ranks: int, channels: int) -> float:
        """An all-reduce around a ring, of as many."""
        return 2 * (ranks - 1) * (self.latency + message(channels) / ranks * self.byte)

    def step(self, ranks: int, layers: int, channels: int) -> float:
        """Both directions of all layers, which have so many channels together."""
        sent = layers * 16 + 16 * channels  # bytes: the sum of the layers' messages
        return 3 * (ranks - 1) * layers * self.latency + (ranks - 1) * (1 + 2 / ranks) * sent * self.byte

    def step_by_doubling(self, ranks: int, layers: int, channels: int) -> float:
        """The same with the fewest messages after one another: log₂ R to gather, twice that to reduce over a tree."""
        sent = layers * 16 + 16 * channels
        return 3 * math.log2(ranks) * layers * self.latency + (ranks - 1 + 2 * (ranks > 1)) * sent * self.byte


def message(channels: int) -> int:
    """Bytes: mean and m2 (or two sums) of each channel and two numbers more, in float64."""
    return 8 * (2 * channels + 2)


NETWORKS = {
    "10 GbE, TCP": Network(50e-6, 1 / 1.1e9),
    "InfiniBand 200 Gb/s": Network(5e-6, 1 / 22e9),
    "NVLink, one machine": Network(2e-6, 1 / 200e9),
}


def seconds_of(call: Callable[[], object], repeats: int, rounds: int = 7) -> float:
    """The median over rounds, all ranks beginning together."""
    times = []
    for _ in range(rounds + 1):
        dist.barrier()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        times.append((time.perf_counter() - start) / repeats)
    return statistics.median(times[1:])


def measure(rank: int, ranks: int, folder: str) -> None:
    """One process: the two collectives by themselves, then layers with and without them."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init{ranks}", rank=rank, world_size=ranks)
    found = {}
    for channels in CHANNELS:
        mine = torch.zeros(message(channels) // 8, dtype=torch.float64)
        everyone = mine.new_empty(ranks * len(mine))
        gather = seconds_of(lambda mine=mine, everyone=everyone: dist.all_gather_into_tensor(everyone, mine), 50)
        reduce = seconds_of(lambda mine=mine: dist.all_reduce(mine), 50)
        x = torch.randn(4, channels, 4, 4, requires_grad=True)
        dy = torch.randn_like(x)
        layers = {"plain": BatchNorm2d(channels), "sync": SyncBatchNorm(channels)}
        times = {
            name: seconds_of(lambda layer=layer, x=x, dy=dy: layer(x).backward(dy), 20)
            for name, layer in layers.items()
        }
        found[channels] = {"gather": gather, "reduce": reduce, **times}
    if rank == 0:
        with open(f"{folder}/{ranks}.json", "w") as file:
            json.dump(found, file)
    dist.destroy_process_group()


def fit(small: dict[str, float], large: dict[str, float]) -> Network:
    """Both constants, from both collectives of the smallest and the largest layer on two ranks: 3 α + 2 m β."""
    few, many = (message(CHANNELS[i]) for i in (0, -1))
    byte = (sum(large[k] for k in ("gather", "reduce")) - sum(small[k] for k in ("gather", "reduce"))) / (
        2 * (many - few)
    )
    return Network((sum(small[k] for k in ("gather", "reduce")) - 2 * few * byte) / 3, byte)


def predictions() -> Table:
    """A row for each number of ranks. That of 8 holds for any number in groups of 8."""
    cells = [
        [str(ranks)]
        + [f"{1e3 * network.step(ranks, *RESNET50):.3g}" for network in NETWORKS.values()]
        + [f"{1e3 * network.step_by_doubling(ranks, *RESNET50):.3g}" for network in NETWORKS.values()]
        + [f"{(ranks - 1) * 16 * (RESNET50[0] + RESNET50[1]) / 1e6:.3g}"]
        for ranks in (1, 2, 4, 8, 16, 64, 256, 1024, 4096)
    ]
    columns = ["ranks", *(f"ring, {name}" for name in NETWORKS), *(f"doubling, {name}" for name in NETWORKS), "MB"]
    return Table("Milliseconds that synchronization adds to a step of ResNet-50", columns, cells, "By the model.")


def main(save: bool) -> None:
    console = Console()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for ranks in (1, 2, 3, 4):
            spawn(measure, (ranks, folder), nprocs=ranks)
            with open(f"{folder}/{ranks}.json") as file:
                found[ranks] = {int(channels): times for channels, times in json.load(file).items()}
    network = fit(found[2][CHANNELS[0]], found[2][CHANNELS[-1]])
    rows = [
        {
            "ranks": ranks,
            "channels": channels,
            "cores": os.cpu_count(),
            "gather_us": round(1e6 * times["gather"]),
            "gather_model_us": round(1e6 * network.forward(ranks, channels)),
            "reduce_us": round(1e6 * times["reduce"]),
            "reduce_model_us": round(1e6 * network.backward(ranks, channels)),
            "batch_norm_us": round(1e6 * times["plain"]),
            "sync_batch_norm_us": round(1e6 * times["sync"]),
        }
        for ranks, sizes in found.items()
        for channels, times in sizes.items()
    ]
    note = f"Fitted on two ranks: α = {1e6 * network.latency:.0f} µs, 1/β = {1e-9 / network.byte:.2f} GB/s."
    cells = [[str(value) for value in row.values()] for row in rows]
    print_table(Table("Synchronized statistics on this machine", list(rows[0]), cells, note), console)
    if save:
        console.print(f"Saved {save_results('sync', rows)}.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", action="store_true", help="print the model's predictions, and measure nothing")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/sync.csv")
    given = parser.parse_args()
    if given.table:
        print_table(predictions(), Console())
    else:
        main(given.save)
