"""Batch norms that can only be folded once others are gone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import settled_models
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnkit
from bnkit import UserError
from bnkit.surgery import fold


class Function(nn.Module):
    """Layers put together by a function."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.padded = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, padding=1)
        self.bn1, self.bn2, self.bn3 = nn.BatchNorm2d(4), nn.BatchNorm2d(4), bnkit.nn.BatchNorm2d(4)
        self.c = nn.Conv2d(4, 4, 3)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def settled(function: Callable[[Any, Tensor], Tensor]) -> Any:
    return settled_models.settled(Function(function), seed=1)


def values() -> Tensor:
    return torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


CHAINS = {
    "two": (lambda m, x: m.b(m.bn3(m.bn1(F.relu(m.a(x))))), "b"),
    "three": (lambda m, x: m.b(m.bn3(m.bn2(m.bn1(F.relu(m.a(x)))))), "b"),
    "three with a pooling": (lambda m, x: m.b(m.bn3(F.avg_pool2d(m.bn2(m.bn1(F.relu(m.a(x)))), 2))), "b"),
    "a branch": (lambda m, x: m.b(m.bn2(h := m.bn1(F.relu(m.a(x))))) + m.c(h), "b, c"),
}


@pytest.mark.parametrize("case", CHAINS)
@pytest.mark.parametrize("inplace", [False, True])
def test_a_chain_goes_on_into_the_convolution_after_it(case, inplace):
    function, target = CHAINS[case]
    model, x = settled(function), values()
    expected = model(x + 1)
    result = fold(model, x, inplace=inplace)
    assert all(reason == "it did not run on the example" for reason in result.skipped.values()), result
    assert result.changed["bn1"] == f"folded into {target}"
    torch.testing.assert_close(result.model(x + 1), expected, rtol=1e-10, atol=1e-10)


def test_a_chain_ahead_of_a_zero_padding_keeps_one_or_moves_the_padding():
    model, x = settled(lambda m, x: m.padded(m.bn2(m.bn1(F.relu(m.a(x)))))), values()
    result = fold(model, x)
    assert result.changed == {"bn2": "folded into bn1"}
    assert "padded pads with zeros" in result.skipped["bn1"]
    result = fold(model, x, padding="exact")
    assert result.changed == {"bn2": "folded into bn1", "bn1": "folded into padded, which pads here"}
    torch.testing.assert_close(result.model(x + 1), model(x + 1), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_model_that_no_longer_runs_after_the_first_of_a_chain(inplace):
    model, x = settled(lambda m, x: m.b(m.bn2(m.bn1(F.relu(m.a(x))))) * m.bn2.eps), values()
    before = copy.deepcopy(model)
    with pytest.raises(UserError, match="must leave a model that runs, but it raises AttributeError"):
        fold(model, x, inplace=inplace)
    assert torch.equal(model(x), before(x))


def test_only_what_is_wanted_is_tried_again():
    model, x = settled(lambda m, x: m.b(m.bn2(m.bn1(F.relu(m.a(x)))))), values()
    assert fold(model, x, where="bn2").changed == {"bn2": "folded into b"}
    result = fold(model, x, where="bn1")
    assert result.changed == {}
    assert result.skipped == {"bn1": "its input comes from relu; and its output goes to batch_norm"}
