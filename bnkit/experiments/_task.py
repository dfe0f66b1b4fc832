"""Images to train and to test stacks of small networks on, and their mini-batches."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..data import BatchOrder, ImageSet
from ._lit_pixels import LitPixels, lists_of, mostly_dark
from ._stacked_input import Inputs

TEST_CHUNK = 500
_GATHERED = 2000


@dataclass(frozen=True)
class Task:
    """Images as rows of pixels, as bytes because a batch is gathered from memory, and their classes.

    Args:
        inputs: how a stack is given them.
        x: of the training images those pixels that `inputs` names.
        y, one_hot: classes of the training images.
        test_x, test_y: the test images, all pixels, and their classes.
    """

    inputs: Inputs
    x: Tensor
    y: Tensor
    one_hot: Tensor
    test_x: Tensor
    test_y: Tensor

    @classmethod
    def of(cls, data: ImageSet, device: torch.device) -> Task:
        """The test images test, all the others train."""
        x, test_x = (images.to(device).flatten(1) for images in (data.train_images, data.test_images))
        y, test_y = data.train_labels.to(device), data.test_labels.to(device)
        one_hot = nn.functional.one_hot(y, data.num_classes).float()
        if device.type == "cpu" and mostly_dark(x, test_x):
            inputs = Inputs(scale=x.max().item() / 255, lit=True)
            return cls(inputs, x != 0, y, one_hot, test_x != 0, test_y)
        used = x.any(0).nonzero()[:, 0]
        return cls(Inputs(scale=1 / 255, used=used), x[:, used], y, one_hot, test_x, test_y)

    def with_held_out(self, count: int) -> Task:
        """The same task, tested on the last `count` training images instead, which no longer train.

        For choosing a learning rate without a look at the test images.
        """
        held_out = self.test_x.new_zeros(count, self.test_x.shape[1])
        held_out[:, slice(None) if self.inputs.used is None else self.inputs.used] = self.x[-count:]
        return dataclasses.replace(
            self,
            x=self.x[:-count],
            y=self.y[:-count],
            one_hot=self.one_hot[:-count],
            test_x=held_out,
            test_y=self.y[-count:],
        )

    @functools.cached_property
    def tests(self) -> list[tuple]:
        """The test images as a stack takes them to evaluate, some at a time, and their classes."""
        chunks = zip(self.test_x.split(TEST_CHUNK), self.test_y.split(TEST_CHUNK), strict=True)
        return [(lists_of(x[None].numpy())[0] if self.inputs.lit else x, y) for x, y in chunks]


def batches(task: Task, seeds: Sequence[int], batch_size: int) -> Iterator[tuple[Sequence, Tensor]]:
    """The mini-batches of every seed, each seed in its own order, without end.

    Yields:
        For each seed the inputs as a stack takes them, and the one-hot classes (S, B, classes).
    """
    orders = [BatchOrder(len(task.x), batch_size, seed) for seed in seeds]
    # Many small batches at once, since for one the call costs more than the copy.
    count = max(1, _GATHERED // (batch_size * len(orders)))
    while True:
        index = torch.cat([next(order) for _ in range(count) for order in orders]).to(task.x.device)
        x, target = (
            values.index_select(0, index).view(count, len(orders), batch_size, -1) for values in (task.x, task.one_hot)
        )
        rows = _lit(x) if task.inputs.lit else (batch.float().unbind() for batch in x)
        yield from zip(rows, target, strict=True)


def _lit(x: Tensor) -> Iterator[list[LitPixels]]:
    """(M, S, B, F) → for each of the M the batches of its S seeds."""
    lit = LitPixels.of(x.flatten(0, 1).numpy())
    return (lit[i : i + x.shape[1]] for i in range(0, len(lit), x.shape[1]))
