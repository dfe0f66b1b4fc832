"""What synchronized statistics cost: a model with two constants, measured here, and its predictions.

`python benchmarks/bench_sync.py` starts 1 to 4 processes on this machine, fits latency and bandwidth of gloo's two
collectives to two sizes on two ranks, and sets the model beside what a layer adds to batch norm for all other sizes.
`--table` prints what the model says for 1 to 4,096 ranks. docs/scaling.md explains both.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from _harness import save_results
from rich.console import Console
from torch.multiprocessing.spawn import spawn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from bnkit import models
from bnkit.nn import BatchNorm2d, SyncBatchNorm
from bnkit.report import Table, print_table

CHANNELS = (16, 256, 2048)
RESNET20, RESNET50 = (19, 688), (53, 26_560)  # layers, channels in all of them


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
        """The same bytes with the fewest messages after one another: log₂ R to gather, twice that to reduce."""
        return self.step(ranks, layers, channels) - 3 * (ranks - 1 - math.log2(ranks)) * layers * self.latency


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
        [
            f"{ranks:,}",
            f"{(ranks - 1) * 16 * sum(RESNET50) / 1e6:,.1f}",
            *(_span(net, ranks) for net in NETWORKS.values()),
        ]
        for ranks in (1, 2, 4, 8, 16, 64, 256, 1024, 4096)
    ]
    columns = ["ranks", "MB gathered", *NETWORKS]
    note = "By the model: with the fewest messages after one another, and round a ring."
    return Table("Milliseconds that synchronization adds to a step of ResNet-50", columns, cells, note)


def _span(network: Network, ranks: int) -> str:
    times = (f(ranks, *RESNET50) for f in (network.step_by_doubling, network.step))
    return " – ".join(f"{1e3 * seconds:,.{0 if seconds >= 0.01 else 1}f}" for seconds in times)


def measure_network(rank: int, ranks: int, folder: str) -> None:
    """One process: a training step of ResNet-20 under DistributedDataParallel, with and without."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/network{ranks}", rank=rank, world_size=ranks)
    x, labels = torch.randn(16, 3, 32, 32), torch.randint(10, (16,))
    found = {}
    for norm in ("batch", "sync"):
        network = DistributedDataParallel(models.create("resnet20", norm=norm, num_classes=10, in_channels=3))
        found[norm] = seconds_of(lambda network=network: F.cross_entropy(network(x), labels).backward(), 2)
    if rank == 0:
        with open(f"{folder}/network{ranks}.json", "w") as file:
            json.dump(found, file)
    dist.destroy_process_group()


def run(function: Callable[[int, int, str], None], ranks: int, folder: str, name: str) -> dict[str, Any]:
    """What the first of so many processes found."""
    spawn(function, (ranks, folder), nprocs=ranks)
    with open(f"{folder}/{name}.json") as file:
        return json.load(file)


def layer_rows(found: dict[int, dict[int, dict[str, float]]], network: Network) -> list[dict[str, object]]:
    """Measured and modelled microseconds, by ranks and channels."""
    return [
        {
            "ranks": ranks,
            "channels": channels,
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


def network_rows(found: dict[int, dict[str, float]], network: Network) -> list[dict[str, object]]:
    """Measured milliseconds of a step, and what the model says that synchronization adds."""
    return [
        {
            "ranks": ranks,
            "batch_ms": round(1e3 * times["batch"], 1),
            "sync_ms": round(1e3 * times["sync"], 1),
            "added_ms": round(1e3 * (times["sync"] - times["batch"]), 1),
            "added_model_ms": round(1e3 * network.step(ranks, *RESNET20), 1),
        }
        for ranks, times in found.items()
    ]


def main(save: bool, table: bool) -> None:
    console, counts = Console(), (1, 2, 3, 4)
    if table:
        print_table(predictions(), console)
        return
    with tempfile.TemporaryDirectory() as folder:
        measured = {ranks: run(measure, ranks, folder, f"{ranks}") for ranks in counts}
        networks = {ranks: run(measure_network, ranks, folder, f"network{ranks}") for ranks in counts[:2]}
    layers = {ranks: {int(c): times for c, times in sizes.items()} for ranks, sizes in measured.items()}
    network = fit(layers[2][CHANNELS[0]], layers[2][CHANNELS[-1]])
    note = f"Fitted on two ranks: α = {1e6 * network.latency:.0f} µs, 1/β = {1e-9 / network.byte:.2f} GB/s."
    for name, title, rows in (
        ("sync", "Synchronized statistics on this machine", layer_rows(layers, network)),
        ("sync_networks", "A step of ResNet-20 with 16 images a rank", network_rows(networks, network)),
    ):
        print_table(Table(title, list(rows[0]), [[str(v) for v in row.values()] for row in rows], note), console)
        if save:
            constants = {
                "alpha_us": round(1e6 * network.latency, 1),
                "gigabytes_per_second": round(1e-9 / network.byte, 3),
            }
            console.print(f"Saved {save_results(name, [{**row, **constants} for row in rows])}.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", action="store_true", help="print the model's predictions, and measure nothing")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/sync.csv")
    given = parser.parse_args()
    main(given.save, given.table)
