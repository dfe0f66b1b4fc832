"""What was measured of models on corrupted images."""

from __future__ import annotations

import statistics
from dataclasses import dataclass


@dataclass(frozen=True)
class CorruptionsConfig:
    """What runs: every model, corruption and strength, with every n and N.

    Attributes:
        test_images: images classified, of the test set.
        adaptation_images: other images of it to adapt on; the largest n.
        counts: n, how many of these; None is all of them.
        source_weights: N, how many images the source's statistics are worth.
        strengths: 1 to 5.
        seed: of the order of images and of the noise.
    """

    test_images: int = 300
    adaptation_images: int = 1000
    counts: tuple[int | None, ...] = (1, 8, 64, 512, None)
    source_weights: tuple[int, ...] = (0, 16, 128)
    strengths: tuple[int, ...] = (1, 2, 3, 4, 5)
    seed: int = 0

    @property
    def sizes(self) -> list[int]:
        """n, with a number for all."""
        return [self.adaptation_images if count is None else count for count in self.counts]


@dataclass(frozen=True)
class Measured:
    """One accuracy; `count` (n) and `source_weight` (N) are None without adaptation, `strength` 0 if not corrupted."""

    model: str
    corruption: str
    strength: int
    count: int | None
    source_weight: int | None
    accuracy: float


@dataclass(frozen=True)
class Corruptions:
    """The accuracies of `corruptions`.

    Attributes:
        config: what ran.
        whole_set: each model's accuracy on all test images, not corrupted and not adapted.
        measured: everything else, on the images of the configuration.
    """

    config: CorruptionsConfig
    whole_set: dict[str, float]
    measured: list[Measured]

    def mean(self, model: str, count: int | None, source_weight: int | None, corruption: str | None = None) -> float:
        """Mean accuracy over strengths of one corruption, or of all; `"none"` is the images as they are."""
        wanted = (model, count, source_weight)
        return statistics.fmean(
            m.accuracy
            for m in self.measured
            if (m.model, m.count, m.source_weight) == wanted
            and (m.corruption == corruption if corruption else m.strength > 0)
        )

    def at(self, model: str, count: int | None, source_weight: int | None, corruption: str, strength: int) -> float:
        """Accuracy at one strength; 0 is the images as they are."""
        corruption = corruption if strength else "none"
        wanted = (model, corruption, strength, count, source_weight)
        (found,) = (
            m.accuracy for m in self.measured if (m.model, m.corruption, m.strength, m.count, m.source_weight) == wanted
        )
        return found

    @property
    def models(self) -> list[str]:
        """The models' names."""
        return list(self.whole_set)
