"""A training run: its fixed and its moving parts."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from ..data import BatchOrder, ImageSet, Photographs
from ..population import EMA
from ._batches import Batches, batches_of
from ._config import FitConfig
from ._devices import Devices, place
from ._groups import parameter_groups
from ._history import Evaluation
from ._random import RandomState


@dataclass
class Run:
    """What a run is made of. Only `model`, `average`, `optimizer`, `order`, `random` and what has a default here ever
    change.
    """

    model: nn.Module
    data: ImageSet | Photographs
    config: FitConfig
    devices: Devices
    batches: Batches
    average: EMA | None
    optimizer: torch.optim.Optimizer
    order: BatchOrder
    random: RandomState
    step: int = 0
    seconds: float = 0.0
    evaluations: list[Evaluation] = field(default_factory=list)


def start(model: nn.Module, data: ImageSet | Photographs, config: FitConfig) -> Run:
    """A run at step 0, with model and data on their device."""
    order = BatchOrder(len(data.train_labels), config.batch_size, config.seed, shuffle=config.shuffle)
    devices = place(model, config)
    # Of SGD's implementations the fused one is the fastest, with few small parameters as with many large ones.
    optimizer = torch.optim.SGD(
        parameter_groups(model, config.weight_decay),
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        fused=True,
    )
    return Run(
        model=model,
        data=data,
        config=config,
        devices=devices,
        batches=batches_of(data, config, devices),
        average=EMA(model, config.ema, buffers="recalibrate") if config.ema else None,
        optimizer=optimizer,
        order=order,
        random=RandomState(config.seed + devices.rank, devices.device),
    )
