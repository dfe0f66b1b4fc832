"""What becomes of batch norms that can't be folded: one multiplication and one addition a channel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import settled_models
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnkit
from bnkit.surgery import fold
from bnkit.surgery._remainder import ChannelAffine


class Function(nn.Module):
    """Layers put together by a function."""

    def __init__(self, function: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b, self.bn = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.ours, self.own = bnkit.nn.BatchNorm2d(4, activation="relu"), Doubling(4)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


class Doubling(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def in_a_loop(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    for _ in range(3):
        y = F.relu(m.bn(m.b(y)))
    return y


def affine(function: Callable[[Any, Tensor], Any]) -> tuple[Any, Any, Tensor]:
    model: Any = settled_models.settled(Function(function), seed=1)
    x = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return model, fold(model, x, rest="affine"), x + 1


EXACT = {
    "several times": (lambda m, x: m.bn(m.a(x)) + m.bn(m.b(m.a(x))), "bn", "it runs 2 times"),
    "in a loop": (in_a_loop, "bn", "it runs 3 times"),
    "on several shapes": (lambda m, x: {"all": m.bn(m.a(x)), "one": m.bn(m.a(x[:, :, :1]))}, "bn", "it runs 2 times"),
    "with a residual and without": (lambda m, x: m.ours(m.ours(m.a(x)), m.a(x)), "ours", "it runs 2 times"),
    "residual by name, ahead": (lambda m, x: m.ours(residual=m.a(x), input=m.b(m.a(x))), "ours", "unusual way"),
}  # fmt: skip


@pytest.mark.parametrize("case", EXACT)
def test_a_norm_that_is_one_multiplication_and_addition_wherever_it_runs(case):
    function, name, reason = EXACT[case]
    model, result, x = affine(function)
    assert list(result.changed) == [name], result
    assert result.changed[name].startswith("made affine: ")
    assert reason in result.changed[name]
    assert isinstance(getattr(result.model, name), ChannelAffine)
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-12, atol=1e-12)


KEPT = {
    "it did not run": (lambda m, x: m.a(x), "bn", "did not run"),
    "forward of its own": (lambda m, x: m.own(m.a(x)), "own", "Doubling has a forward of its own"),
    "batch statistics in one of two runs": (
        lambda m, x: (m.bn.eval()(m.a(x)), m.bn.train()(m.a(x)), m.bn.eval())[1], "bn", "batch's statistics"),
    "weight used elsewhere": (lambda m, x: m.bn(m.bn(m.a(x))) + m.bn.weight.sum(), "bn", "used outside of it"),
}  # fmt: skip


@pytest.mark.parametrize("case", KEPT)
def test_what_stays_a_batch_norm(case):
    function, name, reason = KEPT[case]
    model, result, x = affine(function)
    assert result.changed == {}
    assert reason in result.skipped[name]
    torch.testing.assert_close(result.model(x), model(x), rtol=0, atol=0)
