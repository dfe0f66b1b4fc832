"""Claim: in batches of padded sequences, statistics that leave the padding out train a better network.

Keras' `BatchNormalization` takes a mask for this reason; no paper is known to measure what that gains. Here digits
are sequences of columns from the first with ink to the last, 1 to 28 of them, padded to the longest of the batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from .. import data
from ..data import BatchOrder
from ..nn import BatchNorm1d, MaskedBatchNorm
from ..report import Page
from ._progress import Progress, Silent
from ._small_runs import Batch, accuracy, page, parts_for_testing, run_trials, train
from ._trials import Trial

CLAIM = (
    "A convolutional network on padded sequences reaches a higher test accuracy if the batch statistics leave the "
    "padding out."
)


@dataclass(frozen=True)
class PaddingConfig:
    """What runs: both norms with every rate and seed.

    Attributes:
        steps: updates of a run.
        batch_size: sequences an update.
        channels: of the convolutions.
        rates: learning rates.
        seeds: runs of each.
        test_images: how many of them are used.
    """

    steps: int = 400
    batch_size: int = 16
    channels: int = 32
    rates: tuple[float, ...] = (0.02, 0.1)
    seeds: int = 3
    test_images: int = 10_000


@dataclass(frozen=True)
class Padding:
    """The runs of `padding`."""

    config: PaddingConfig
    trials: list[Trial]


class SequenceNetwork(nn.Module):
    """Two convolutions over time with norm and ReLU, the mean over the steps with data, and a linear layer.

    Padding is zero before each convolution, so that only the norms' statistics can depend on it.
    """

    def __init__(self, channels: int, *, masked: bool) -> None:
        super().__init__()
        self.masked = masked
        kind = MaskedBatchNorm if masked else BatchNorm1d
        self.convolutions = nn.ModuleList(nn.Conv1d(c, channels, 3, padding=1, bias=False) for c in (28, channels))
        self.norms = nn.ModuleList(kind(channels, activation="relu") for _ in range(2))
        self.linear = nn.Linear(channels, 10)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(N, 28, T), zero where the mask (N, T) is False, to (N, 10)."""
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            y = convolution(x) * mask[:, None]
            x = (norm(y, mask) if self.masked else norm(y)) * mask[:, None]
        return self.linear(x.sum(2) / mask.sum(1, keepdim=True))


ARMS = {"padding counted": False, "padding masked": True}


def padding(config: PaddingConfig | None = None, *, progress: Progress | None = None) -> Padding:
    """Train a network on digits as padded sequences with each norm: see the module's claim."""
    config, digits = config or PaddingConfig(), data.load("digits")

    def trial(arm: str, rate: float, seed: int) -> Trial:
        torch.manual_seed(seed)
        model = SequenceNetwork(config.channels, masked=ARMS[arm])
        loss, seconds = train(model, _training(digits, config.batch_size, seed), config.steps, rate)
        return Trial(arm, rate, seed, loss, accuracy(model, _test(digits, config.test_images)), seconds)

    return Padding(config, run_trials(ARMS, config.rates, config.seeds, trial, progress or Silent()))


def _training(digits: data.ImageSet, size: int, seed: int) -> Iterator[Batch]:
    for indices in BatchOrder(len(digits.train_images), size, seed):
        yield _padded(digits.train_images[indices]), digits.train_labels[indices]


def _test(digits: data.ImageSet, count: int) -> Iterable[Batch]:
    for images, labels in parts_for_testing(digits, count):
        yield _padded(images), labels


def _padded(images: Tensor) -> tuple[Tensor, Tensor]:
    """(N, 1, 28, 28) bytes to sequences (N, 28, T) of columns in [0, 1], and the mask (N, T)."""
    sequences = []
    for image in images[:, 0]:
        inked = image.any(0).nonzero()[:, 0].tolist() or [0]
        sequences.append(image[:, inked[0] : inked[-1] + 1].t())
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    padded = pad_sequence(sequences, batch_first=True).float() / 255
    return padded.transpose(1, 2), torch.arange(padded.shape[1]) < lengths[:, None]


def page_of(result: Padding, command: str = "") -> Page:
    """The result as a report."""
    return page("Padded sequences", CLAIM, result, "padding counted", command)
