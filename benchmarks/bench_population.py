"""Seconds of recalibration against fvcore's `update_bn_stats` and torch's `update_bn`, on the same batches and model.

The peers get the model in training mode with dropout off, as their documentation asks for. fvcore is left out where
layers take the residual: its hooks drop it, so that it would measure another network, in less time.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import fvcore.nn
import torch
import torchvision
from _harness import quantiles, save_results, take_turns
from rich.console import Console
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from bnkit import models, population
from bnkit._allocator import tune_allocator
from bnkit.report import Table, print_table

BNKITS = "ResNet-20 of bnkit's layers"
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "ResNet-20": (lambda: models.create("resnet20", num_classes=10, norm=nn.BatchNorm2d), 64, 32),
    BNKITS: (lambda: models.create("resnet20", num_classes=10), 64, 32),
    "ResNet-50": (torchvision.models.resnet50, 8, 224),
    "DenseNet-121": (torchvision.models.densenet121, 8, 224),
}
"""How to build each, the batch size, and the side of the images. The layers are torch.nn's where nothing is said."""


def cases(model: nn.Module, data: list[Tensor]) -> dict[str, Callable[[], object]]:
    """The three tools on one model."""

    def fvcores() -> None:
        with torch.no_grad():
            fvcore.nn.update_bn_stats(model.train(), data, len(data))

    def torchs() -> None:
        with torch.no_grad():
            update_bn(data, model)

    return {
        "bnkit pooled": lambda: population.recalibrate(model.train(), data),
        "bnkit batch": lambda: population.recalibrate(model.train(), data, "batch"),
        "fvcore": fvcores,
        "torch": torchs,
    }


def main(rounds: int = 5, save: bool = False, batches: int = 4, networks: str = "all", threads: int = 1) -> None:
    """Measure, print, and with `save` write `results/population.csv`."""
    tune_allocator()
    torch.set_num_threads(threads)
    chosen = NETWORKS if networks == "all" else {name: NETWORKS[name] for name in networks.split(",")}
    rows = []
    for name, (build, batch, side) in chosen.items():
        data = [torch.randn(batch, 3, side, side) for _ in range(batches)]
        tools = cases(build(), data)
        if name == BNKITS:
            del tools["fvcore"]
        for case, seconds in take_turns(tools, rounds, warm_up=1).items():
            low, middle, high = (1e3 * value / batches for value in quantiles(seconds))
            rows.append({"network": name, "tool": case, "batch": batch, "p20": low, "ms_a_batch": middle, "p80": high})
    cells = [[r["network"], r["tool"], *(f"{r[k]:.1f}" for k in ("p20", "ms_a_batch", "p80"))] for r in rows]
    print_table(
        Table("Milliseconds a batch", ["network", "tool", "p20", "p50", "p80"], cells),
        Console(),
    )
    if save:
        print(save_results("population", rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--networks", default="all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    main(arguments.rounds, arguments.save, arguments.batches, arguments.networks, arguments.threads)
