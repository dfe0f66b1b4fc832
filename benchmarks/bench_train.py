"""Images a second of `bnkit train` against training loops as torchvision's and timm's scripts have them.

ResNet-20 on images of 32×32, and ResNet-18 on photographs of 400×300 of which squares of 128×128 are cut, all in class
folders of JPEG files (smooth noise, written for the occasion). What is timed is an epoch: reading, augmenting,
training. The photographs are read and decoded anew in each epoch by all sides, in as many worker processes as there are
cores; so do the peers with the small images, which bnkit reads once, before. The peers train in float32 and contiguous,
the default of both scripts on a CPU:

- torchvision: `ImageFolder`, a `DataLoader`, and transforms as in its references/classification (random crop or
  resized crop, mirror image, conversion, normalization);
- timm: `timm.data.create_dataset` and `create_loader` with their default augmentation, timm's ResNet-18 (it has no
  ResNet-20: there the plain one).

"Same settings" is bnkit in float32 and contiguous, "recipe" what `bnkit train` picks.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _harness import in_fresh_process, quantiles, save_results, take_turns
from PIL import Image
from rich.console import Console
from torch import nn
from torch.nn import functional as F

from bnkit import data, models
from bnkit._allocator import tune_allocator
from bnkit.report import Table, print_table
from bnkit.train import FitConfig, fast_precision, iterate

NETS = {"resnet20": (32, 128, 2048), "resnet18": (128, 32, 256)}
"""Side, batch size and images of an epoch."""
PHOTOGRAPH = (400, 300)
WORKERS = os.cpu_count() or 1


def write_images(folder: Path, side: int, count: int) -> None:
    """`count` training images and a few test images of two classes."""
    generator = np.random.default_rng(0)
    size = (side, side) if side == 32 else PHOTOGRAPH
    for split, images in (("train", count), ("test", 8)):
        for i in range(images):
            path = folder / split / "ab"[i % 2] / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            coarse = generator.integers(0, 256, (size[1] // 4, size[0] // 4, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path, quality=90)


def plain_network(name: str) -> nn.Module:
    """The network as people write it."""
    if name == "resnet18":
        import torchvision

        return torchvision.models.resnet18(num_classes=2)
    return models.create(
        name, nn.BatchNorm2d, num_classes=2, activation=functools.partial(nn.ReLU, inplace=True), image_size=32
    )


def loop(model: nn.Module, loader: Iterable[Any]) -> Callable[[], None]:
    """An epoch of the loop that both scripts come down to."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)

    def epoch() -> None:
        model.train()
        for x, target in loader:
            loss = F.cross_entropy(model(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return epoch


def torchvision_epoch(name: str, folder: Path) -> Callable[[], None]:
    """As in torchvision's references/classification."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    side, batch, _ = NETS[name]
    crop = v2.RandomCrop(side, padding=4) if side == 32 else v2.RandomResizedCrop(side, antialias=True)
    normalize = v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    transform = v2.Compose(
        [v2.PILToTensor(), crop, v2.RandomHorizontalFlip(), v2.ToDtype(torch.float32, scale=True), normalize]
    )
    loader = torch.utils.data.DataLoader(
        ImageFolder(str(folder / "train"), transform), batch, shuffle=True, num_workers=WORKERS, persistent_workers=True
    )
    return loop(plain_network(name), loader)


def timm_epoch(name: str, folder: Path) -> Callable[[], None]:
    """As in timm's train.py."""
    import timm
    from timm.data.dataset_factory import create_dataset
    from timm.data.loader import create_loader

    side, batch, _ = NETS[name]
    dataset = create_dataset("", root=str(folder), split="train", is_training=True)
    loader = create_loader(
        dataset,  # pyright: ignore[reportArgumentType]
        input_size=(3, side, side),
        batch_size=batch,
        is_training=True,
        use_prefetcher=False,
        num_workers=WORKERS,
        device=torch.device("cpu"),
    )
    model = timm.create_model("resnet18", num_classes=2) if name == "resnet18" else plain_network(name)
    return loop(model, loader)


def bnkit_epoch(name: str, folder: Path, recipe: bool) -> Callable[[], object]:
    """An epoch of `bnkit.train`, which evaluates on next to nothing.

    Its workers, which go on from epoch to epoch, are stopped in the others' turns: they must not decode ahead there.
    """
    side, batch, count = NETS[name]
    images = data.load(folder, size=side) if side == 32 else data.photographs(folder, side)
    config = FitConfig(
        steps=10**6,
        batch_size=batch,
        lr=0.1,
        momentum=0.9,
        weight_decay=1e-4,
        augment="crop=4,flip" if side == 32 else "resized_crop=0.08,flip",
        precision=fast_precision(torch.device("cpu")) if recipe else "32-true",
        channels_last=recipe,
        eval_every=count // batch,
        normalize="imagenet",
        workers=WORKERS,
    )
    others = set(multiprocessing.active_children())
    run = iterate(models.create(name, num_classes=2, image_size=side), images, config)
    next(run)
    next(run)
    workers = set(multiprocessing.active_children()) - others

    def send(signal_: signal.Signals) -> None:
        for worker in workers:
            assert worker.pid is not None
            os.kill(worker.pid, signal_)

    def epoch() -> None:
        send(signal.SIGCONT)
        next(run)
        send(signal.SIGSTOP)

    send(signal.SIGSTOP)
    return epoch


def measure(name: str, rounds: int) -> list[dict[str, Any]]:
    """A row a side: images a second."""
    tune_allocator()
    side, batch, count = NETS[name]
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        write_images(folder, side, count)
        cases: dict[str, Callable[[], object]] = {
            "torchvision": torchvision_epoch(name, folder),
            "timm": timm_epoch(name, folder),
            "bnkit, same settings": bnkit_epoch(name, folder, recipe=False),
            "bnkit, recipe": bnkit_epoch(name, folder, recipe=True),
        }
        times = take_turns(cases, rounds, warm_up=1)
        for worker in multiprocessing.active_children():
            assert worker.pid is not None
            os.kill(worker.pid, signal.SIGCONT)  # so that they can end
    images = count // batch * batch
    rows = []
    for case, values in times.items():
        high, middle, low = (images / value for value in quantiles(values))
        ratios = [min(pair) / own for *pair, own in zip(times["torchvision"], times["timm"], values, strict=True)]
        rows.append(
            {
                "network": name,
                "side": case,
                "images_per_second_p20": round(low, 1),
                "images_per_second_p50": round(middle, 1),
                "images_per_second_p80": round(high, 1),
                "times_faster_peer": round(quantiles(ratios)[1], 2),
                "rounds": rounds,
            }
        )
    return rows


def main(rounds: int = 5, save: bool = False) -> None:
    """Measure each network in a process of its own, print the table, and keep it if asked."""
    rows = [row for name in NETS for row in in_fresh_process(__file__, "--measure", name, "--rounds", str(rounds))]
    cells = [
        [
            row["network"],
            row["side"],
            f"{row['images_per_second_p50']:,} ({row['images_per_second_p20']:,} to {row['images_per_second_p80']:,})",
            f"{row['times_faster_peer']:.2f}",
        ]
        for row in rows
    ]
    columns = ["network", "side", "images/s, median (p20 to p80)", "times the faster peer"]
    note = f"{rounds} epochs of each side, taking turns in one process, under the tuned allocator."
    console = Console()
    print_table(Table("Training throughput", columns, cells, note), console)
    if save:
        console.print(f"Saved {save_results('train', rows)}.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", choices=tuple(NETS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/train.csv")
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(given.measure, given.rounds)))
    else:
        main(given.rounds, given.save)
