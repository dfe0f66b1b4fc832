"""Claim: batch normalization inside the recurrence of an LSTM makes it train faster on digits read as a sequence.

Cooijmans, Ballas, Laurent, Gülçehre and Courville, "Recurrent Batch Normalization", 2016,
https://arxiv.org/abs/1603.09025, section 5.1. There a step reads one pixel, 784 of them; here eight, 98 steps.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import data
from ..data import BatchOrder
from ..nn import BNLSTM
from ..report import Page
from ._progress import Progress, Silent
from ._small_runs import accuracy, parts_for_testing
from ._trials import Trial, accuracy_table, best_of, relation

CLAIM = (
    "An LSTM with batch normalization in its recurrence learns to tell digits read pixel by pixel in fewer updates "
    "than one without (Cooijmans et al. 2016, figure 3)."
)


@dataclass(frozen=True)
class SequentialDigitsConfig:
    """What runs: both networks with every rate and seed. In both the forget gate's bias starts at 1.

    Attributes:
        steps: updates of a run, by Adam with gradients clipped to a norm of 1.
        batch_size: sequences an update.
        hidden_size: of the LSTM.
        pixels: read at a time; a divisor of 784.
        rates: learning rates.
        seeds: runs of each.
        test_images: how many of them are used.
    """

    steps: int = 600
    batch_size: int = 64
    hidden_size: int = 64
    pixels: int = 8
    rates: tuple[float, ...] = (0.001, 0.005)
    seeds: int = 3
    test_images: int = 2000


@dataclass(frozen=True)
class SequentialDigits:
    """The runs of `sequential_digits`."""

    config: SequentialDigitsConfig
    trials: list[Trial]


class SequenceClassifier(nn.Module):
    """An LSTM and a linear layer on its last hidden state."""

    def __init__(self, lstm: nn.Module, hidden_size: int) -> None:
        super().__init__()
        self.lstm = lstm
        self.linear = nn.Linear(hidden_size, 10)

    def forward(self, sequences: Tensor) -> Tensor:
        _, (h, _) = self.lstm(sequences)
        return self.linear(h[-1])


def sequential_digits(
    config: SequentialDigitsConfig | None = None, *, progress: Progress | None = None
) -> SequentialDigits:
    """Train an LSTM and a batch-normalized LSTM on the bundled digits as sequences: see the module's claim."""
    config, progress = config or SequentialDigitsConfig(), progress or Silent()
    digits, trials = data.load("digits"), []
    arms = ("LSTM", "BNLSTM")
    runs = [(arm, rate, seed) for arm in arms for rate in config.rates for seed in range(config.seeds)]
    progress.phase(f"{len(runs)} runs", len(runs) * config.steps)
    for done, (arm, rate, seed) in enumerate(runs):

        def report(step: int, before: int = done * config.steps) -> None:
            progress.update(before + step, {trial.arm: trial.accuracy for trial in trials})

        trials.append(_run(arm, rate, seed, digits, config, report))
    return SequentialDigits(config, trials)


def _run(
    arm: str,
    rate: float,
    seed: int,
    digits: data.ImageSet,
    config: SequentialDigitsConfig,
    report: Callable[[int], None],
) -> Trial:
    torch.manual_seed(seed)
    if arm == "BNLSTM":
        lstm = BNLSTM(config.pixels, config.hidden_size, batch_first=True, max_length=784 // config.pixels)
        gates = lstm.layers[0].get_parameter("norm_ih.bias")
    else:
        lstm = nn.LSTM(config.pixels, config.hidden_size, batch_first=True)
        gates = lstm.get_parameter("bias_ih_l0")
    gates.data[config.hidden_size : 2 * config.hidden_size] = 1.0
    model = SequenceClassifier(lstm, config.hidden_size)
    optimizer = torch.optim.Adam(model.parameters(), rate)
    order = BatchOrder(len(digits.train_images), config.batch_size, seed)
    losses, started = [], time.perf_counter()
    for step in range(config.steps):
        indices = next(order)
        loss = F.cross_entropy(model(_sequences(digits.train_images[indices], config)), digits.train_labels[indices])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        report(step + 1)
    seconds = time.perf_counter() - started
    last = losses[-max(config.steps // 10, 1) :]
    test = (((_sequences(images, config),), labels) for images, labels in parts_for_testing(digits, config.test_images))
    return Trial(arm, rate, seed, sum(last) / len(last), accuracy(model, test), seconds)


def _sequences(images: Tensor, config: SequentialDigitsConfig) -> Tensor:
    """(N, 1, 28, 28) bytes to (N, T, pixels), row by row, in [0, 1]."""
    return images.flatten(1).float().div(255).unflatten(1, (-1, config.pixels))


def page_of(result: SequentialDigits, command: str = "") -> Page:
    """The result as a report."""
    config = result.config
    title = f"Test accuracy after {config.steps:,} updates, {784 // config.pixels} time steps"
    return Page(
        title="Digits as a sequence",
        claim=CLAIM,
        summary=summary(result),
        tables=[accuracy_table(result.trials, title)],
        configuration=dataclasses.asdict(config),
        command=command,
    )


def summary(result: SequentialDigits) -> list[str]:
    """The answer in sentences, each network at its best rate."""
    plain, normalized = (best_of(result.trials, arm) for arm in ("LSTM", "BNLSTM"))
    return [
        f"After {result.config.steps:,} updates the batch-normalized LSTM reaches {normalized} and the plain one "
        f"{plain}: {relation(normalized, plain, 'no different')}.",
        f"Their training losses are {normalized.train_loss:.3f} and {plain.train_loss:.3f}. An update takes the first "
        f"{normalized.seconds / plain.seconds:.1f} times as long: PyTorch's LSTM is one fused call.",
    ]
