"""What does batch normalization buy? One network without and with it, on the same batches from the same weights.

Claim (Ioffe and Szegedy 2015, section 4.1 and figure 1): a network of three hidden layers of 100 sigmoid units on
binary digits trains faster and to a higher test accuracy with batch normalization, and the inputs of its last sigmoid
keep a more stable distribution. The paper gives neither the learning rate nor the scale of the small Gaussian weights,
and both decide how large the difference is; so the default job also searches a grid of both and compares each network
at its own best.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from .. import models
from .._checks import check_seed, require, unknown
from .._devices import chosen_device
from .._environment import describe_machine
from ..data import ImageSet, load
from ..train import FitConfig
from ._grid import Grid, run_grid
from ._lockstep import create_stack, create_stacks, evaluation_steps, step_seconds, train_stacks
from ._progress import Progress, Silent
from ._record import Configuration, NetRecord, label_of
from ._separate import train_separately
from ._side_by_side import threads
from ._task import Task

PAPER_RATE = 0.5
PAPER_INIT_STD = 0.01


@dataclass(frozen=True)
class CompareConfig:
    """All that a comparison depends on.

    Args:
        model: a name from `bnkit.models.list()`, with or without `bnkit:` ahead of it.
        data: a name from `bnkit.data.names()` or a folder of class folders of images.
        norms: the norms to compare, at least one; `"none"` is no norm.
        steps: mini-batches each network sees.
        learning_rate: of all networks; by default 0.5 for `mlp` and 0.05 for other models.
        batch_size: images a step.
        seed: of the first run; it decides the initial weights and the order of the batches.
        seeds: runs of each network, with consecutive seeds.
        quick: leave out the grid and the runs at each network's own best.
        grid_steps: mini-batches each cell of the grid sees.
        evaluations: evaluations on the test images, at least.
        image_size: side to which the images of a folder are resized; None for the data's own.
        threads: CPU threads, by default PyTorch's; networks in lockstep are shared out among as many processes.
        device: `"cpu"`, `"cuda"`, or `"auto"`.
        devices: processes that share each batch, started by torchrun; networks that train as one stack use one.
        data_dir, download, skip_corrupt: see `bnkit.data.load`.
    """

    model: str = "mlp"
    data: str = "digits"
    norms: tuple[str, ...] = ("none", "batch")
    steps: int = 50_000
    learning_rate: float | None = None
    batch_size: int = 60
    seed: int = 0
    seeds: int = 1
    quick: bool = False
    grid_steps: int = 1000
    evaluations: int = 200
    image_size: int | None = None
    threads: int | None = None
    device: str = "auto"
    devices: int = 1
    data_dir: str | None = None
    download: bool = False
    skip_corrupt: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.model, str):
            raise unknown("model", self.model, models.list())
        library, _, name = self.model.rpartition(":")
        require(
            library in ("", "bnkit"),
            f"compare exchanges norms, which only bnkit's own models let it, got {self.model!r}: name one that "
            "`bnkit models` lists.",
        )
        object.__setattr__(self, "model", name)
        if self.model not in models.list():
            raise unknown("model", self.model, models.list())
        for norm in self.norms:
            if norm not in models.norms():
                raise unknown("norm", norm, models.norms())
        require(
            0 < len(self.norms) == len(set(self.norms)), f"name each norm once, got {', '.join(self.norms) or 'none'}."
        )
        for name in ("steps", "batch_size", "seeds", "grid_steps", "evaluations"):
            value = getattr(self, name)
            require(value >= 1, f"{name.replace('_', ' ')} must be at least 1, got {value}.")
        require(self.threads is None or self.threads >= 1, f"--threads must be at least 1, got {self.threads}.")
        check_seed(self.seed)
        require(0 < self.rate < math.inf, f"the learning rate must be positive and finite, got {self.rate:g}.")
        require(
            self.batch_size > 1 or "batch" not in self.norms,
            "batch normalization needs more than one image a batch, got batch size 1: use --batch-size 2 or more, "
            "or another norm.",
        )

    @property
    def rate(self) -> float:
        """The learning rate, chosen for the model where none was given."""
        if self.learning_rate is not None:
            return self.learning_rate
        return PAPER_RATE if self.model == "mlp" else 0.05

    @property
    def stacked(self) -> bool:
        """Whether the networks can be trained as one stack, which the grid needs too."""
        return self.model == "mlp" and set(self.norms) <= {"none", "batch"}

    @property
    def with_grid(self) -> bool:
        """Whether each network's own best learning rate and initial scale are searched."""
        return self.stacked and not self.quick


@dataclass
class Comparison:
    """What a comparison measured.

    Args:
        config: what was asked for.
        protocol: one record a norm, all at the same learning rate.
        tuned: one record a norm, each at its own best of the grid; empty without a grid.
        grid: the accuracies it was chosen from.
        partial: why the run ended early, or None.
        seconds: of the whole job.
        environment: machine and versions.
        skipped: image files left out because they can't be read.
    """

    config: CompareConfig
    protocol: list[NetRecord]
    tuned: list[NetRecord]
    grid: Grid | None
    partial: str | None
    seconds: float
    environment: Mapping[str, object]
    skipped: tuple[str, ...] = ()

    @property
    def records(self) -> list[NetRecord]:
        """All networks, in the order of the tables."""
        return [*self.protocol, *self.tuned]


def compare(
    config: CompareConfig = CompareConfig(), data: ImageSet | None = None, progress: Progress | None = None
) -> Comparison:
    """Run the comparison that `config` describes.

    Args:
        data: the images, if they are already loaded.
        progress: is told what goes on.

    Returns:
        All measurements. An interrupt (Ctrl-C) ends it early and returns what was measured so far.

    Raises:
        UserError: impossible settings, or data that can't be had.
    """
    start = time.perf_counter()
    progress = progress or Silent()
    data = data or load(
        config.data,
        data_dir=config.data_dir,
        download=config.download,
        size=config.image_size,
        skip_corrupt=config.skip_corrupt,
    )
    require(
        config.batch_size <= len(data.train_images),
        f"the batch size must not exceed the {len(data.train_images)} training images, got {config.batch_size}.",
    )
    run = _run_stacked if config.stacked else _run_separately
    with threads(config.threads):
        result = Comparison(config, [], [], None, None, 0.0, describe_machine(), data.skipped)
        run(result, data, chosen_device(config.device, ("cuda", "cpu")), progress)
    result.seconds = time.perf_counter() - start
    return result


def _records(config: CompareConfig, configurations: Iterable[Configuration], suffix: str = "") -> list[NetRecord]:
    seeds = list(range(config.seed, config.seed + config.seeds))
    return [NetRecord(label_of(c.norm) + suffix, c, seeds) for c in configurations]


def _run_stacked(result: Comparison, data: ImageSet, device: torch.device, progress: Progress) -> None:
    """All networks in lockstep, after the grid that finds each one's own best."""
    config = result.config
    task = Task.of(data, device)
    # The stack wants the networks without a norm first; the tables follow.
    norms = sorted(config.norms, key=lambda norm: norm != "none")
    result.protocol = _records(config, [Configuration(norm, config.rate, PAPER_INIT_STD) for norm in norms])
    if config.with_grid:
        result.grid = run_grid(data, task, norms, config.batch_size, config.grid_steps, config.seed, progress)
        if not result.grid.complete:
            result.partial = f"interrupted in the grid after {result.grid.steps} steps; nothing else was run"
            return
        result.tuned = _records(config, map(result.grid.best_configuration, norms), ", own best")
    records = sorted(result.records, key=lambda record: record.configuration.norm != "none")
    try:
        seconds = {norm: _solo_step_seconds(norm, data, task, config) for norm in norms}
        stacks = create_stacks([record.configuration for record in records], records[0].seeds, data, task)
        steps = evaluation_steps(config.steps, config.evaluations)
        progress.phase("training", config.steps)
        snapshots = train_stacks(stacks, task, records[0].seeds, config.batch_size, steps)
        for snapshot in snapshots:
            for i, record in enumerate(records):
                record.add_snapshot(snapshot, i, seconds[record.configuration.norm])
            progress.update(snapshot.step, {record.label: record.latest() for record in records})
    except KeyboardInterrupt:
        result.partial = _interrupted(records, config)


def _solo_step_seconds(norm: str, data: ImageSet, task: Task, config: CompareConfig) -> float:
    """Seconds a step of one network alone: trained together, the networks' own shares can't be told apart."""
    stack = create_stack([Configuration(norm, config.rate, PAPER_INIT_STD)], [config.seed], data, task)
    return step_seconds(stack, task, config.batch_size)


def _run_separately(result: Comparison, data: ImageSet, device: torch.device, progress: Progress) -> None:
    """Each network with the ordinary training loop."""
    config = result.config
    init_std = PAPER_INIT_STD if config.model == "mlp" else None
    result.protocol = _records(config, [Configuration(norm, config.rate, init_std) for norm in config.norms])
    every = max(1, config.steps // config.evaluations)
    fit = FitConfig(
        steps=config.steps,
        batch_size=config.batch_size,
        eval_every=every,
        normalize="unit" if config.model == "mlp" else "channel",
        device=device.type,
        devices=config.devices,
    )
    evaluations = [*range(0, config.steps, every), config.steps]
    progress.phase("training", config.steps)
    try:
        for step in train_separately(config.model, result.protocol, data, fit, evaluations):
            progress.update(step, {record.label: record.latest() for record in result.protocol})
    except KeyboardInterrupt:
        result.partial = _interrupted(result.protocol, config)


def _interrupted(records: list[NetRecord], config: CompareConfig) -> str:
    done = max((record.steps[-1] for record in records if record.steps), default=0)
    return f"interrupted after {done:,} of {config.steps:,} steps"
