"""Claim: a network that learns two domains in turn does better with statistics of its own for each.

Chang, You, Seo, Kwak and Han, "Domain-Specific Batch Normalization for Unsupervised Domain Adaptation", 2019,
https://arxiv.org/abs/1906.03950; Xie et al., "Adversarial Examples Improve Image Recognition", 2020,
https://arxiv.org/abs/1911.09665, section 4. Here the domains are digits and their negatives, white on black and black
on white, both with labels; each batch is of one of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import data
from ..data import BatchOrder
from ..nn import BatchNorm2d, DomainBatchNorm, use_domain
from ..report import Page
from ._progress import Progress, Silent
from ._small_runs import Batch, accuracy, page, parts_for_testing, run_trials, train
from ._trials import Trial
from .small_batches import small_network

CLAIM = (
    "A network trained on batches of two domains in turn reaches a higher test accuracy with running statistics of its "
    "own for each domain than with common ones (Chang et al. 2019; Xie et al. 2020)."
)
DOMAINS = ("digits", "negatives")


@dataclass(frozen=True)
class DomainsConfig:
    """What runs: every norm with every rate and seed.

    Attributes:
        steps: updates of a run, half of them in each domain.
        batch_size: images an update.
        rates: learning rates.
        seeds: runs of each.
        test_images: how many of them are used.
    """

    steps: int = 400
    batch_size: int = 64
    rates: tuple[float, ...] = (0.02, 0.1)
    seeds: int = 3
    test_images: int = 10_000


@dataclass(frozen=True)
class Domains:
    """The runs of `domains`."""

    config: DomainsConfig
    trials: list[Trial]


class InDomain(nn.Module):
    """A network that is told the domain of a batch, whether or not it makes a difference to it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.distinguishes = any(isinstance(module, DomainBatchNorm) for module in network.modules())

    def forward(self, images: Tensor, domain: str) -> Tensor:
        if not self.distinguishes:
            return self.network(images)
        with use_domain(self.network, domain):
            return self.network(images)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "common statistics": BatchNorm2d,
    "own statistics": functools.partial(DomainBatchNorm, domains=DOMAINS),
    "own statistics and affine": functools.partial(DomainBatchNorm, domains=DOMAINS, shared_affine=False),
}


def domains(config: DomainsConfig | None = None, *, progress: Progress | None = None) -> Domains:
    """Train a small convolutional network on digits and their negatives with each norm: see the module's claim."""
    config, digits = config or DomainsConfig(), data.load("digits")

    def trial(arm: str, rate: float, seed: int) -> Trial:
        torch.manual_seed(seed)
        model = InDomain(small_network(NORMS[arm]))
        loss, seconds = train(model, _training(digits, config.batch_size, seed), config.steps, rate)
        return Trial(arm, rate, seed, loss, accuracy(model, _test(digits, config.test_images)), seconds)

    return Domains(config, run_trials(NORMS, config.rates, config.seeds, trial, progress or Silent()))


def _training(digits: data.ImageSet, size: int, seed: int) -> Iterator[Batch]:
    for step, indices in enumerate(BatchOrder(len(digits.train_images), size, seed)):
        domain = DOMAINS[step % 2]
        yield (_images(digits.train_images[indices], domain), domain), digits.train_labels[indices]


def _test(digits: data.ImageSet, count: int) -> Iterable[Batch]:
    for domain in DOMAINS:
        for images, labels in parts_for_testing(digits, count):
            yield (_images(images, domain), domain), labels


def _images(images: Tensor, domain: str) -> Tensor:
    pixels = images.float() / 255
    return pixels if domain == "digits" else 1 - pixels


def page_of(result: Domains, command: str = "") -> Page:
    """The result as a report."""
    return page("Digits and their negatives", CLAIM, result, "common statistics", command)
