"""Photographs in files as batches, decoded ahead by processes of their own."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from .._checks import require
from ..data import Augmentation, BatchOrder, Examples, Photographs, collated, usual_workers
from ._config import FitConfig
from ._devices import Devices
from ._normalize import Normalization

Keys = list[tuple[int, int]]


class PhotographBatches:
    """Batches of `data`, in the order and with the random changes that follow from the seed alone.

    Args:
        data: The photographs.
        config: `augment` changes training images, `workers` processes do it; `normalize` and `channels_last`.
        devices: Where, and which share of each training batch.
    """

    def __init__(self, data: Photographs, config: FitConfig, devices: Devices) -> None:
        self._data, self._config, self._devices = data, config, devices
        self._normalized = Normalization(data, config, devices)
        self._kept: dict[tuple[int, ...], DataLoader[Any]] = {}

    def stream(self, order: BatchOrder) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's share of the training batches in `order`, which moves on with each that is taken."""
        augmentation = Augmentation.parse(self._config.augment)
        examples = self._data.training_examples(augmentation, self._config.seed)
        # The workers run ahead, so they follow an order of their own.
        for batch in self._read(self._loader(examples, self._shares(copy.deepcopy(order))), every=True):
            next(order)
            yield batch

    def calibration(self, count: int, batch_size: int) -> Iterator[Tensor]:
        """This process's share of `count` training images spread over all, not augmented."""
        if (count, batch_size) not in self._kept:
            examples = self._data.calibration_examples()
            index = range(0, len(examples), max(1, len(examples) // count))[:count]
            share = index[self._devices.rank :: self._devices.world]
            self._kept[count, batch_size] = self._loader(examples, _split(share, batch_size), kept=True)
        for images, _ in self._read(self._kept[count, batch_size]):
            yield images

    def test(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The test images and labels in order."""
        if (batch_size,) not in self._kept:
            examples = self._data.test_examples()
            self._kept[batch_size,] = self._loader(examples, _split(range(len(examples)), batch_size), kept=True)
        return self._read(self._kept[batch_size,])

    def _shares(self, order: BatchOrder) -> Iterator[Keys]:
        while True:
            epoch, index = order.epoch, next(order)
            yield [(i, epoch) for i in index[self._devices.rank :: self._devices.world].tolist()]

    def _loader(self, examples: Examples, keys: Iterable[Keys], *, kept: bool = False) -> DataLoader[Any]:
        """A loader, whose workers, if it is kept, wait for the next time: to start them costs a large process seconds,
        in which its memory is copied page by page.
        """
        workers = usual_workers(self._devices.world) if self._config.workers is None else self._config.workers
        return DataLoader(
            examples,
            batch_sampler=keys,  # pyright: ignore[reportArgumentType]
            num_workers=workers,
            persistent_workers=kept and workers > 0,
            collate_fn=collated,
            pin_memory=self._devices.device.type == "cuda",
            generator=torch.Generator(),  # else it would draw from the run's own random numbers
        )

    def _read(self, loader: DataLoader[Any], *, every: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches in which something can be read; `every` one must be such, or at least one."""
        device, count = self._devices.device, 0
        for images, labels, fault in loader:
            require(
                not fault or self._data.skip_corrupt,
                f"{fault}: replace or remove it, or leave such files out with --skip-corrupt (skip_corrupt=True).",
            )
            require(
                len(images) > 0 or not every,
                f"no photograph of a batch could be read; one reason: {fault}; replace them.",
            )
            if len(images) > 0:
                count += 1
                yield self._normalized(images.to(device, non_blocking=True)), labels.to(device, non_blocking=True)
        require(count > 0, f"none of the photographs in {self._data.path} needed here can be read: replace them.")


def _split(index: range, batch_size: int) -> list[Keys]:
    return [[(i, 0) for i in index[first : first + batch_size]] for first in range(0, len(index), batch_size)]
