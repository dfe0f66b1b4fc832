"""torch's batch norm makes its output dense, which views of it rely on: what stands in its place must too."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import settled_models
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnkit
from bnkit.surgery import fold


class Transposed(nn.Module):
    """A linear layer on (N, L, C), a batch norm over C, and a view of its output."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.bn, self.head = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(20, 2)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.bn(self.between(self.linear(x)).transpose(1, 2)).view(len(x), -1))


def folded(model: nn.Module, x: Tensor, **options: Any) -> Any:
    """Fold, and compare on another input than the example."""
    model = settled_models.settled(model, seed=1)
    result = fold(model, x, **options)
    assert list(result.changed) == ["bn"], result
    torch.testing.assert_close(result.model(x + 1), model(x + 1), rtol=1e-10, atol=1e-10)
    return result


def values(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def test_a_view_behind_a_norm_of_transposed_values():
    before = folded(Transposed(nn.Identity()), values(2, 5, 3))
    assert before.changed == {"bn": "folded into linear"}
    assert set(before.model.state_dict()) == {"linear.weight", "linear.bias", "head.weight", "head.bias"}
    torch.testing.assert_close(pickle.loads(pickle.dumps(before.model))(values(2, 5, 3)), before.model(values(2, 5, 3)))
    assert folded(Transposed(F.relu), values(2, 5, 3)).changed == {"bn": "folded into head"}


def test_a_view_behind_a_multiplication_and_addition_of_transposed_values():
    class Twice(Transposed):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + super().forward(x + 1)

    folded(Twice(F.relu), values(2, 5, 3), rest="affine")


class Sliced(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.last = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x)[:, :4])
        assert y.is_contiguous(memory_format=torch.channels_last)
        return self.last(y)


def test_channels_last_stays_dense():
    x = values(2, 3, 5, 5).to(memory_format=torch.channels_last)
    assert folded(Sliced(), x).changed == {"bn": "folded into last"}


def test_a_dense_input_is_handed_on_as_it_is():
    for format in (torch.contiguous_format, torch.channels_last):
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).to(memory_format=format)
        result = fold(settled_models.settled(model, seed=1), values(2, 3, 5, 5).contiguous(memory_format=format))
        assert isinstance(result.model[1], nn.Identity)


@pytest.mark.parametrize("by_name", [False, True])
def test_a_residual_that_is_none(by_name):
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.bn = nn.Linear(3, 4), bnkit.nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.linear(x), residual=None) if by_name else self.bn(self.linear(x), None)

    model = settled_models.settled(Block(), seed=1)
    result = fold(model, x := values(5, 3))
    assert result.changed == {"bn": "folded into linear"}
    torch.testing.assert_close(result.model(x + 1), model(x + 1), rtol=1e-10, atol=1e-10)


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.bn, self.last = nn.Conv2d(3, 4, 1), bnkit.nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.bn(F.relu(self.first(x)), None))


def test_a_residual_that_is_none_ahead_of_padding():
    assert folded(Padded(), values(2, 3, 5, 5), padding="exact").changed == {"bn": "folded into last, which pads here"}


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.bn, self.head = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(20, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x).relu().transpose(1, 2)
        return self.head(self.bn(y).view(len(x), -1)) + self.head(self.bn(y.contiguous()).view(len(x), -1))


def test_a_norm_of_dense_and_of_transposed_values_stays():
    model = settled_models.settled(Both(), seed=1)
    result = fold(model, values(2, 5, 3), rest="affine")
    assert result.changed == {}
    assert result.skipped == {"bn": "it runs 2 times"}
