"""Folding where something writes in place to what a batch norm reads: its identity would hand on the new values."""

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


class Function(nn.Module):
    """Layers put together by a function, with one batch norm more that always folds."""

    def __init__(self, function: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)
        self.bn, self.end, self.ours = nn.BatchNorm2d(4), nn.BatchNorm2d(2), bnkit.nn.BatchNorm2d(4)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.last(self.function(self, x)))


def folded(function: Callable[[Any, Tensor], Any]) -> Any:
    """Fold, and compare on another input than the example."""
    model: Any = settled_models.settled(Function(function), seed=1)
    x, other = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    result = fold(model, x)
    with torch.no_grad():
        torch.testing.assert_close(result.model(other), model(other), rtol=1e-10, atol=1e-10)
    assert result.changed["end"] == "folded into last"
    return result


def written_between(write: Callable[[Tensor], object]) -> Callable[[Any, Tensor], Tensor]:
    def function(m: Any, x: Tensor) -> Tensor:
        h = F.silu(m.a(x))
        z = m.bn(h)
        write(h)
        return m.b(z) + h

    return function


def written_under_a_view(m: Any, x: Tensor) -> Tensor:
    h = F.silu(m.a(x))
    z = m.bn(h.view(h.shape))
    h += 1
    return m.b(z) + h


def written_before_a_view_is_read(m: Any, x: Tensor) -> Tensor:
    h = F.silu(m.a(x))
    z = m.bn(h).contiguous().view(h.shape)
    h += 1
    return m.b(z) + h


WRITES = {
    "addition": written_between(lambda h: h.add_(1)),
    "activation": written_between(F.relu_),
    "one channel": written_between(lambda h: h[:, 0].zero_()),
    "through a view": written_between(lambda h: h.flatten(1).add_(1)),
    "through data": written_between(lambda h: h.data.add_(1)),
    "through a detached tensor": written_between(lambda h: h.detach().add_(1)),
    "to the tensor of which the input is a view": written_under_a_view,
    "before a view of the output is read": written_before_a_view_is_read,
}


@pytest.mark.parametrize("case", WRITES)
def test_an_input_written_before_the_output_is_read(case):
    result = folded(WRITES[case])
    assert "its input is overwritten by" in result.skipped["bn"]


def test_an_output_whose_shape_is_changed_in_place():
    def function(m: Any, x: Tensor) -> Tensor:
        h = F.silu(m.a(x))
        z = m.bn(h)
        z.unsqueeze_(-1)
        return m.b(z.squeeze(-1)) + h

    assert "its output is changed in place by unsqueeze" in folded(function).skipped["bn"]


def added_to_what_was_read(m: Any, x: Tensor) -> Tensor:
    h = F.silu(m.a(x))
    h += m.b(m.bn(h))
    return h


def pooled_before_the_write(m: Any, x: Tensor) -> Tensor:
    h = F.silu(m.a(x))
    z = F.avg_pool2d(m.bn(h), 1)
    h += 1
    return m.b(z) + h


def written_before_it_is_read(m: Any, x: Tensor) -> Tensor:
    h = F.silu(m.a(x)).add_(1)
    return m.b(m.bn(h)) + h


@pytest.mark.parametrize("function", [added_to_what_was_read, pooled_before_the_write, written_before_it_is_read])
def test_writes_that_do_no_harm(function):
    assert folded(function).changed["bn"] == "folded into b"


def test_a_residual_that_is_the_input():
    def function(m: Any, x: Tensor) -> Tensor:
        h = m.a(x)
        return m.ours(h, h)

    assert "its input is also its residual" in folded(function).skipped["ours"]
