"""Claim: new batch statistics alone win back part of the accuracy that corrupted images cost, even from few images.

Schneider et al., "Improving robustness against common corruptions by covariate shift adaptation", 2020,
https://arxiv.org/abs/2006.16971, figure 1 and section 4 (ImageNet-C); with N = 0 AdaBN, Li et al., "Revisiting Batch
Normalization For Practical Domain Adaptation", 2016, https://arxiv.org/abs/1603.04779.

The paper adapts to each batch of n test images and classifies that batch. Here n unlabelled images of the domain are
measured once, and other images of it are classified with the result, as a deployed model would be.
"""

from __future__ import annotations

import copy
import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .._checks import require
from ..population import adapt
from ..report import Curve, LinePlot, Page, Panels, Table
from ._corrupt import STRENGTHS, corrupted
from ._progress import Progress, Silent

CLAIM = (
    "Statistics measured on unlabelled corrupted images win back part of the lost accuracy, without training, and even "
    "with few images if they are blended with the source's (Schneider et al. 2020)."
)
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class CorruptionsConfig:
    """What runs: every model, corruption and strength, with every n and N.

    Attributes:
        test_images: images classified.
        adaptation_images: other images to adapt on; the largest n.
        counts: n, how many of these; None is all of them.
        source_weights: N, how many images the source's statistics are worth.
        draws: how often the smallest n's images are drawn anew: as often for n = 1, and 1 from n = 64.
        strengths: 1 to 5.
        seed: of the order of images and of the noise.
    """

    test_images: int = 500
    adaptation_images: int = 1000
    counts: tuple[int | None, ...] = (1, 8, 64, 512, None)
    source_weights: tuple[int, ...] = (0, 16, 128)
    draws: int = 2
    strengths: tuple[int, ...] = (1, 2, 3, 4, 5)
    seed: int = 0


@dataclass(frozen=True)
class Measured:
    """One accuracy; `count` and `source_weight` are None without adaptation."""

    model: str
    corruption: str
    strength: int
    count: int | None
    source_weight: int | None
    accuracy: float


@dataclass(frozen=True)
class Corruptions:
    """The accuracies of `corruptions`."""

    config: CorruptionsConfig
    measured: list[Measured]

    def mean(self, model: str, count: int | None, source_weight: int | None, corruption: str | None = None) -> float:
        """Mean accuracy over corruptions (or one of them), strengths and draws."""
        wanted = (model, count, source_weight)
        found = [m for m in self.measured if (m.model, m.count, m.source_weight) == wanted and m.strength > 0]
        return statistics.fmean(m.accuracy for m in found if corruption in (None, m.corruption))

    def clean(self, model: str, count: int | None = None, source_weight: int | None = None) -> float:
        """Accuracy on the images as they are."""
        wanted = (model, count, source_weight, 0)
        found = [m for m in self.measured if (m.model, m.count, m.source_weight, m.strength) == wanted]
        return statistics.fmean(m.accuracy for m in found)

    @property
    def models(self) -> list[str]:
        """The models' names."""
        return list(dict.fromkeys(m.model for m in self.measured))


def corruptions(
    models: Mapping[str, nn.Module],
    images: Tensor,
    labels: Tensor,
    config: CorruptionsConfig | None = None,
    *,
    progress: Progress | None = None,
) -> Corruptions:
    """Classify corrupted images before and after adaptation: see the module's claim.

    Args:
        models: trained models by name, whose inputs are normalized as ImageNet's are.
        images: uint8, (N, 3, H, W), at least as many as are tested and adapted on.
        labels: (N,).
        config: what runs.
        progress: told after each domain.
    """
    config, progress = config or CorruptionsConfig(), progress or Silent()
    needed = config.test_images + config.adaptation_images
    require(len(images) >= needed, f"{needed} images are needed, got {len(images)}: lower test_images.")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(config.seed))[:needed]
    pixels, labels = images[order].float() / 255, labels[order][: config.test_images]
    domains = [("none", 0), *((name, strength) for name in STRENGTHS for strength in config.strengths)]
    found: list[Measured] = []
    progress.phase("Domains", len(domains) * len(models))
    done = 0
    for corruption, strength in domains:
        inputs = _normalized(corrupted(pixels, "noise" if strength == 0 else corruption, strength, config.seed))
        for name, model in models.items():
            done += 1
            found += _measure(name, model, corruption, strength, inputs, labels, config)
            progress.update(done, {m.model: m.accuracy for m in found[-1:]})
    return Corruptions(config, found)


def _normalized(pixels: Tensor) -> Tensor:
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in _IMAGENET)
    return (pixels - mean) / std


def _measure(
    name: str,
    model: nn.Module,
    corruption: str,
    strength: int,
    inputs: Tensor,
    labels: Tensor,
    config: CorruptionsConfig,
) -> list[Measured]:
    test, pool = inputs[: config.test_images], inputs[config.test_images :]

    def measured(network: nn.Module, count: int | None, weight: int | None) -> Measured:
        return Measured(name, corruption, strength, count, weight, _accuracy(network, test, labels))

    found = [measured(model, None, None)]
    for count in config.counts:
        size = len(pool) if count is None else count
        for draw in range(config.draws if size < 64 else 1):
            for weight in config.source_weights:
                adapted = copy.deepcopy(model)
                adapt(adapted, pool[draw * size : (draw + 1) * size].split(128), weight)
                found.append(measured(adapted, size, weight))
    return found


@torch.inference_mode()
def _accuracy(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    model.eval()
    predicted = torch.cat([model(part).argmax(1) for part in inputs.split(125)])
    return (predicted == labels).double().mean().item()


def page_of(result: Corruptions, command: str = "") -> Page:
    """The result as a report."""
    return Page(
        title="Adapting to corrupted images by statistics alone",
        claim=CLAIM,
        summary=[_sentence(result, model) for model in result.models],
        tables=[*(_table(result, model) for model in result.models), _by_corruption(result)],
        figures=[figure(result)],
        configuration=dataclasses.asdict(result.config),
        command=command,
    )


def _sizes(config: CorruptionsConfig) -> list[int]:
    return [config.adaptation_images if count is None else count for count in config.counts]


def _best(result: Corruptions, model: str) -> tuple[int, int]:
    """The n and N of the highest mean accuracy."""
    pairs = [(n, weight) for n in _sizes(result.config) for weight in result.config.source_weights]
    return max(pairs, key=lambda pair: result.mean(model, *pair))


def _sentence(result: Corruptions, model: str) -> str:
    before, clean = result.mean(model, None, None), result.clean(model)
    n, weight = _best(result, model)
    after, one = result.mean(model, n, weight), _sizes(result.config)[0]
    single = max(result.mean(model, one, w) for w in result.config.source_weights)
    verdict = "wins back" if after > before else "does not win back"
    return (
        f"{model}: {clean:.1%} on clean images, {before:.1%} on corrupted ones; adaptation {verdict} accuracy: "
        f"{after:.1%} with n = {n}, N = {weight}, and at best {single:.1%} with n = {one}."
    )


def _table(result: Corruptions, model: str) -> Table:
    sizes = _sizes(result.config)
    rows = [
        [f"N = {weight}", *(f"{result.mean(model, n, weight):.1%}" for n in sizes)]
        for weight in result.config.source_weights
    ]
    note = f"Before: {result.mean(model, None, None):.1%} corrupted, {result.clean(model):.1%} clean."
    return Table(f"{model}: mean accuracy on corrupted images", ["", *(f"n = {n}" for n in sizes)], rows, note)


def _by_corruption(result: Corruptions) -> Table:
    rows = []
    for model in result.models:
        n, weight = _best(result, model)
        for corruption in STRENGTHS:
            accuracies = result.mean(model, None, None, corruption), result.mean(model, n, weight, corruption)
            rows.append([f"{model}, {corruption}", *(f"{a:.1%}" for a in accuracies), f"n = {n}, N = {weight}"])
    return Table("Mean over strengths", ["", "before", "adapted", "with"], rows)


def figure(result: Corruptions) -> Panels:
    """Accuracy against strength, before and adapted, a panel a corruption of the first model."""
    model = result.models[0]
    n, weight = _best(result, model)
    few = _sizes(result.config)[min(1, len(result.config.counts) - 1)]
    largest = max(result.config.source_weights)
    arms: Sequence[tuple[str, int | None, int | None]] = (
        ("as trained", None, None),
        (f"n = {few}, N = {largest}", few, largest),
        (f"n = {n}, N = {weight}", n, weight),
    )
    plots = [_plot(result, model, corruption, arms) for corruption in STRENGTHS]
    return Panels("corruptions", f"{model} on corrupted images", plots, caption=_sentence(result, model))


def _plot(
    result: Corruptions, model: str, corruption: str, arms: Sequence[tuple[str, int | None, int | None]]
) -> LinePlot:
    strengths = [0, *result.config.strengths]

    def at(strength: int, n: int | None, weight: int | None) -> float:
        wanted = (model, n, weight, strength)
        found = [m for m in result.measured if (m.model, m.count, m.source_weight, m.strength) == wanted]
        return statistics.fmean(m.accuracy for m in found if m.corruption in ("none", corruption))

    curves = [Curve(label, strengths, [at(s, n, weight) for s in strengths]) for label, n, weight in arms]
    return LinePlot(corruption, "strength", "test accuracy", curves, percent=True)
