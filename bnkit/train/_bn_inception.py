"""The training of the batch-normalization paper's networks (Ioffe and Szegedy 2015, section 4.2)."""

from __future__ import annotations

from typing import Any

from .._checks import unknown
from ..models import BN_INCEPTION_RECIPES

# Where the papers give no number, these are the original's: TensorFlow's L2 penalty, a moderate colour jitter.
_WEIGHT_DECAY = 4e-5
_COLOR, _LESS_COLOR = 0.4, 0.2


def bn_inception_settings(name: str, epochs: float) -> dict[str, Any]:
    """How `"Inception"`, `"BN-Baseline"`, `"BN-x5"`, `"BN-x30"` or `"BN-x5-Sigmoid"` is trained; any case will do.

    Batches of 32, momentum 0.9, and a rate that falls by 4% every 8 epochs (Szegedy et al. 2015, section 6), or six
    times as fast.

    Args:
        name: A key of `bnkit.models.BN_INCEPTION_RECIPES`, whose `create` makes the network.
        epochs: Passes over the training images that the run will make.

    Returns:
        Settings of `FitConfig`, and in `"color"` the strength of the photometric distortions.

    Raises:
        UserError: an unknown name.
    """
    names = {key.lower(): key for key in BN_INCEPTION_RECIPES}
    if name.lower() not in names:
        raise unknown("recipe", name, names)
    recipe = BN_INCEPTION_RECIPES[names[name.lower()]]
    return {
        "batch_size": 32,
        "lr": recipe.learning_rate,
        "momentum": 0.9,
        "nesterov": False,
        "weight_decay": _WEIGHT_DECAY * recipe.weight_decay_factor,
        "schedule": "exponential",
        "decay": 0.96 ** (epochs / 8 * recipe.decay_speedup),
        "shuffle": "within-shards" if recipe.shuffle_within_shards else "shards",
        "color": _LESS_COLOR if recipe.fewer_distortions else _COLOR,
    }
