"""The learning rate of each step."""

from __future__ import annotations

import math

from ._config import FitConfig


def learning_rate(config: FitConfig, step: int) -> float:
    """The rate of the update number `step`, from 0.

    Warm-up: `lr · (step + 1) / warmup_steps` (Goyal et al. 2017, section 2.2). After it `lr`, or, for the cosine
    schedule, `lr · (1 + cos(π t)) / 2` with t from 0 at its start to 1 at the end of the run (Loshchilov and Hutter
    2017, equation 5, without restarts), or, for steps, `lr / 10` from half of the run's steps on and `lr / 100` from
    three quarters, or, exponential, `lr · decay^t`. It depends on nothing else, so a resumed run needs no state for it.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "step":
        return config.lr / 10 ** sum(step >= config.steps * part for part in (0.5, 0.75))
    progress = (step - config.warmup_steps) / (config.steps - config.warmup_steps)
    if config.schedule == "exponential":
        return config.lr * config.decay**progress
    return config.lr * (1 + math.cos(math.pi * progress)) / 2
