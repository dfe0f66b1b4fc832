"""Claim: new batch statistics alone win back part of the accuracy that corrupted images cost, even from few images.

Schneider et al., "Improving robustness against common corruptions by covariate shift adaptation", 2020,
https://arxiv.org/abs/2006.16971, figure 1 and section 4 (ImageNet-C); with N = 0 AdaBN, Li et al., "Revisiting Batch
Normalization For Practical Domain Adaptation", 2016, https://arxiv.org/abs/1603.04779.

The paper adapts to each batch of n test images and classifies that batch. Here n unlabelled images of the domain are
measured once, and other images of it are classified with the result, as a deployed model would be.

The models are the ResNets of https://github.com/akamaster/pytorch_resnet_cifar10, trained on CIFAR-10.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import data as image_sets
from .. import models
from .._checks import require
from .._weights import load_weights
from ..data import IMAGENET_MEAN, IMAGENET_STD
from ..population import adapt
from ._corrupt import STRENGTHS, corrupted
from ._corruptions_page import page_of
from ._corruptions_record import Corruptions, CorruptionsConfig, Measured
from ._progress import Progress, Silent

__all__ = ["Corruptions", "CorruptionsConfig", "Measured", "classify", "corruptions", "page_of"]

WEIGHTS = {"resnet20": "resnet20-12fca82f.th", "resnet32": "resnet32-d509ac18.th"}
"""The models and the names under which their weights are published."""

_BATCH = 125


def corruptions(
    data: str | os.PathLike[str],
    weights: str | os.PathLike[str],
    config: CorruptionsConfig | None = None,
    *,
    progress: Progress | None = None,
) -> Corruptions:
    """Classify corrupted test images of CIFAR-10 before and after adaptation: see the module's claim.

    Args:
        data: CIFAR-10, as `bnkit.data.load` takes it.
        weights: the folder with the files of `WEIGHTS`.
        config: what runs.
        progress: told after each model and domain.

    Raises:
        UserError: no such data or weights.
    """
    networks = {name: models.create(name, num_classes=10) for name in WEIGHTS}
    for name, network in networks.items():
        load_weights(network, Path(weights) / WEIGHTS[name])
    images = image_sets.load(data)
    return classify(networks, images.test_images, images.test_labels, config, progress=progress)


def classify(
    networks: Mapping[str, nn.Module],
    images: Tensor,
    labels: Tensor,
    config: CorruptionsConfig | None = None,
    *,
    progress: Progress | None = None,
) -> Corruptions:
    """Classify corrupted images before and after adaptation.

    Args:
        networks: trained models by name, whose inputs are normalized as ImageNet's are.
        images: uint8, (N, 3, H, W), more than are tested.
        labels: (N,).
        config: what runs.
        progress: told after each model and domain.

    Raises:
        UserError: too few images.
    """
    config, progress = config or CorruptionsConfig(), progress or Silent()
    needed = config.test_images + config.adaptation_images
    require(len(images) >= needed, f"{needed} images are needed, got {len(images)}: lower test_images.")
    domains = [("none", 0), *((name, strength) for name in STRENGTHS for strength in config.strengths)]
    order = _shuffled(len(images), config.seed)[:needed]
    test_labels, found = labels[order[: config.test_images]], list[Measured]()
    progress.phase(f"{len(domains)} domains, {len(networks)} networks", len(domains) * len(networks))
    for position, (corruption, strength) in enumerate(domains):
        pixels = corrupted(images[order].float() / 255, corruption, strength, config.seed)
        test, pool = _normalized(pixels).split([config.test_images, config.adaptation_images])
        pool = pool[_shuffled(len(pool), config.seed + position)]  # n = 1 is another image in each domain
        for done, (name, network) in enumerate(networks.items(), position * len(networks) + 1):
            for count, weight, accuracy in _accuracies(network, test, test_labels, pool, config):
                found.append(Measured(name, corruption, strength, count, weight, accuracy))
            progress.update(done, {f"{name}, {corruption} {strength}": found[-1].accuracy})
    whole = {name: _whole_set(network, images, labels) for name, network in networks.items()}
    return Corruptions(config, whole, found)


def _shuffled(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def _normalized(pixels: Tensor) -> Tensor:
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return ((pixels - mean) / std).contiguous(memory_format=torch.channels_last)


def _accuracies(
    network: nn.Module, test: Tensor, labels: Tensor, pool: Tensor, config: CorruptionsConfig
) -> Iterator[tuple[int | None, int | None, float]]:
    """n, N and the accuracy; first None and None, without adaptation."""
    yield None, None, _accuracy(network, test, labels)
    for size in config.sizes:
        for weight in config.source_weights:
            adapted = copy.deepcopy(network)
            adapt(adapted, pool[:size].split(_BATCH), weight)
            yield size, weight, _accuracy(adapted, test, labels)


def _whole_set(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    parts = zip(images.split(1000), labels.split(1000), strict=True)
    right = sum(_accuracy(network, _normalized(x.float() / 255), y) * len(y) for x, y in parts)
    return right / len(labels)


@torch.inference_mode()
def _accuracy(network: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    network.eval()
    predicted = torch.cat([network(part).argmax(1) for part in inputs.split(_BATCH)])
    return (predicted == labels).double().mean().item()
