"""A name that is none of the choices, of whatever type it is, is one clear error."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bnkit
from bnkit._checks import unknown

X = torch.zeros(4, 3)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: bnkit.nn.BatchNorm2d(4, activation=nn.ReLU()),
            r"activation must be a name, got ReLU\(\): .*leaky_relu",
        ),
        (lambda: bnkit.functional.batch_norm(X, None, None, training=True, activation=F.relu), "got <function relu"),
        (lambda: bnkit.recalibrate(nn.BatchNorm1d(3), X, method=3), "method must be a name, got 3: .*pooled"),
        (lambda: bnkit.models.create(3), "model must be a name, got 3: .*vgg11"),
        (lambda: bnkit.models.create("vgg11", norm=3), "norm must be a name, got 3: .*batch"),
        (
            lambda: bnkit.insert(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), X, norm=3),
            "norm must be a name, got 3: .*batch",
        ),
        (lambda: bnkit.experiments.CompareConfig(model=3), "model must be a name, got 3: .*vgg11"),
    ],
    ids=["layer", "function", "recalibrate", "model", "norm", "insert", "compare"],
)
def test_what_is_no_string(call: Callable[[], object], words: str) -> None:
    with pytest.raises(bnkit.UserError, match=words):
        call()


def test_the_words() -> None:
    assert str(unknown("norm", "Bath", ["group", "batch"])) == "unknown norm 'Bath': did you mean batch?"
    assert str(unknown("norm", "x", ["group", "batch"])) == "unknown norm 'x': choose one of batch, group."
    network = nn.Sequential(*[nn.Linear(3, 3) for _ in range(100)])
    words = str(unknown("activation", network, ["relu"]))
    assert words.startswith("activation must be a name, got Sequential( (0): Linear(")
    assert words.endswith(": choose one of relu.")
    assert "\n" not in words
    assert len(words) < 200
