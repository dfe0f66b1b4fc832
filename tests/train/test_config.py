from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from bnkit._checks import UserError
from bnkit.train import FitConfig


def test_json_round_trip() -> None:
    config = FitConfig(
        steps=500,
        batch_size=60,
        lr=0.5,
        momentum=0.9,
        nesterov=True,
        weight_decay=1e-4,
        label_smoothing=0.1,
        augment="crop=4,flip",
        ema=0.99,
        channels_last=True,
        schedule="exponential",
        decay=0.1,
        warmup_steps=10,
        loss="cross-entropy",
        shuffle="shards",
        workers=3,
        seed=3,
        eval_every=100,
        eval_batch_size=64,
        checkpoint_every=200,
        normalize="unit",
        precision="bf16-mixed",
        device="cpu",
        devices=2,
    )
    defaults = FitConfig(steps=1).to_dict()
    assert [key for key, value in config.to_dict().items() if value == defaults[key]] == ["loss"]
    assert FitConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_it_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        FitConfig(steps=1).lr = 1.0  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "steps must be an integer of 1 or more, got 0"),
        ({"steps": 1.5}, r"steps must be an integer of 1 or more, got 1\.5"),
        ({"steps": True}, "steps must be an integer of 1 or more, got True"),
        ({"batch_size": -1}, "batch_size must be an integer of 1 or more, got -1"),
        ({"eval_every": 0}, "eval_every must be an integer of 1 or more"),
        ({"eval_batch_size": 0}, "eval_batch_size must be an integer of 1 or more"),
        ({"seed": -1}, "seed must be an integer of 0 or more, got -1"),
        ({"seed": 2**63}, r"the seed must be less than 2\^63, got 9223372036854775808"),
        ({"lr": 0.0}, r"lr must be a positive number, got 0\.0"),
        ({"lr": float("nan")}, "lr must be a positive number, got nan"),
        ({"lr": "fast"}, "lr must be a positive number, got 'fast'"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1\.0"),
        ({"label_smoothing": 1}, r"label_smoothing must be in \[0, 1\), got 1: try 0\.1"),
        ({"nesterov": True}, r"Nesterov's momentum needs one, got momentum=0\.0"),
        ({"augment": "crop"}, "an augmentation is NAME=NUMBER"),
        ({"weight_decay": -0.1}, r"weight_decay must be zero or positive, got -0\.1"),
        ({"schedule": "cosin"}, r"unknown schedule 'cosin': did you mean cosine\?"),
        ({"normalize": "units"}, r"unknown normalize 'units': did you mean unit\?"),
        ({"precision": "bf16"}, "unknown precision 'bf16': did you mean bf16-mixed"),
        ({"device": "gpu"}, "unknown device 'gpu': did you mean cpu"),
        ({"warmup_steps": 11}, "the warm-up must end within the run, got warmup_steps=11 of steps=10"),
        ({"batch_size": 9, "devices": 2}, "batch must split evenly over the devices, got batch_size=9 on devices=2"),
        ({"eval_every": 4, "checkpoint_every": 6}, "checkpoint_every must be a multiple of eval_every=4, got 6"),
    ],
)
def test_each_bad_value_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        FitConfig(**{"steps": 10, **values})
    with pytest.raises(UserError, match=message):
        FitConfig.from_dict({"steps": 10, **values})


def test_unknown_and_missing_settings() -> None:
    with pytest.raises(UserError, match=r"unknown setting 'batchsize': did you mean batch_size"):
        FitConfig.from_dict({"steps": 1, "batchsize": 4})
    with pytest.raises(UserError, match="must say for how many steps"):
        FitConfig.from_dict({})
