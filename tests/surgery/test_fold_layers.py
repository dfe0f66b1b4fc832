"""Folding into layers that are written in a way of their own, and models that change what they are given."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import settled_models
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnkit
from bnkit import UserError
from bnkit.surgery import convert, fold, fuse


def settled(model: nn.Module) -> Any:
    return settled_models.settled(model, seed=1)


def values(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


class PlainNone(nn.Module):
    """A layer whose bias is no parameter, but a plain attribute."""

    def __init__(self, linear: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4) if linear else torch.randn(4, 4, 3, 3))
        self.bias = None
        self.apply_to = F.linear if linear else F.conv2d

    def forward(self, x: Tensor) -> Tensor:
        return self.apply_to(x, self.weight, self.bias)


class WithoutBias(nn.Conv2d):
    """A layer that has the place for a bias and does not use it."""

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, self.weight, None, self.stride, self.padding)


class Helped(nn.Conv2d):
    """A layer whose forward reads the bias elsewhere."""

    def run(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight, self.bias)

    def forward(self, input: Tensor) -> Tensor:
        return self.run(input)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("linear", [False, True])
def test_a_bias_that_is_a_plain_none(linear, norm_first):
    layers = [PlainNone(linear), nn.BatchNorm1d(4) if linear else nn.BatchNorm2d(4)]
    model = settled(nn.Sequential(*(layers[::-1] if norm_first else layers)))
    x = values(4, 4) if linear else values(4, 4, 6, 6)
    before = copy.deepcopy(model)
    result = fold(model, x)
    assert len(result.changed) == 1
    torch.testing.assert_close(result.model(x + 1), before(x + 1), rtol=1e-10, atol=1e-10)
    with pytest.raises(UserError, match="nothing was changed"):
        fold(model, x, tolerance=-1.0, inplace=True)
    assert model[int(norm_first)].bias is None
    torch.testing.assert_close(model(x), before(x), rtol=0, atol=0)


def test_a_layer_that_would_not_use_a_bias_is_left_and_the_others_are_folded():
    first, second = WithoutBias(4, 4, 3, bias=False), Helped(4, 4, 3, bias=False)
    model = settled(nn.Sequential(first, nn.BatchNorm2d(4), nn.ReLU(), second, nn.BatchNorm2d(4)))
    result = fold(model, x := values(2, 4, 8, 8))
    assert result.skipped.keys() == {"1"}
    assert "0 has no place for a bias" in result.skipped["1"]
    assert result.changed == {"4": "folded into 3"}
    torch.testing.assert_close(result.model(x + 1), model(x + 1), rtol=1e-10, atol=1e-10)


def test_a_bias_that_says_false():
    layer = PlainNone(linear=True)
    layer.bias = False
    layer.apply_to = lambda x, weight, bias: F.linear(x, weight)
    model = settled(nn.Sequential(layer, nn.BatchNorm1d(4)))
    assert "no place for a bias" in fold(model, values(4, 4)).skipped["1"]


class GrowingConcatenation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3) for _ in range(2))
        self.bn = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.empty(0, dtype=x.dtype)
        for conv in self.convs:
            out = torch.cat([out, conv(x)], 1)
        return self.bn(out)


def test_a_concatenation_that_starts_empty_is_refused():
    model = settled(GrowingConcatenation())
    result = fold(model, x := values(2, 4, 6, 6))
    assert "several dimensions" in result.skipped["bn"]
    assert torch.equal(result.model(x), model(x))


class ResidualFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c, self.d, self.bn = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), bnkit.nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(residual=self.d(x), input=self.c(x))


def test_a_residual_given_by_name_ahead_of_the_input_is_not_taken_for_it():
    model = settled(ResidualFirst())
    result = fold(model, x := values(2, 4, 3, 3))
    assert result.skipped == {"bn": "it is called in an unusual way"}
    assert torch.equal(result.model(x), model(x))


class Counting(nn.Module):
    """A model that puts another tensor in a buffer's place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.register_buffer("n", torch.zeros(()))
        self.register_buffer("wide", torch.zeros(1).expand(4))

    def forward(self, x: Tensor) -> Tensor:
        self.n = self.n + 1
        return self.bn(self.conv(x)) + self.n


@pytest.mark.parametrize("change", [
    lambda model, x: fold(model, x, inplace=True, data=[x, x]),
    lambda model, x: fold(model, x, data=x),
    lambda model, x: bnkit.insert(model, [x]),
    lambda model, x: fuse(model, x, inplace=True),
    lambda model, x: convert(model, "ghost", example=x),
], ids=["fold in place", "fold", "insert", "fuse", "convert"])  # fmt: skip
def test_a_buffer_that_is_assigned_anew_is_put_back(change):
    model = settled(Counting())
    buffer, x = model.n, values(2, 4, 3, 3)
    result = change(model, x)
    assert model.n is buffer
    for counting in (model, result.model):
        assert float(counting.n) == 0


class Writing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x.sub_(0.5)))


@pytest.mark.parametrize("change", [fold, fuse], ids=["fold", "fuse"])
def test_a_model_that_writes_to_its_input_does_not_write_to_the_example(change):
    model, x = settled(Writing()), values(2, 4, 3, 3)
    before = x.clone()
    result = change(model, x)
    assert result.changed
    assert torch.equal(x, before)
    torch.testing.assert_close(result.model(before.clone()), model(before.clone()), rtol=1e-10, atol=1e-10)


def test_a_model_that_cannot_be_copied_cannot_be_compared_on_data():
    model = settled(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    with pytest.warns(FutureWarning):
        torch.nn.utils.weight_norm(model[0])
    with pytest.raises(UserError, match="leave data out"):
        fold(model, x := values(2, 4, 3, 3), inplace=True, data=[x])


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bn = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.fc(x)).relu().to_sparse()


def test_sparse_outputs_are_compared():
    result = fold(settled(Sparse()), values(5, 4))
    assert result.changed == {"bn": "folded into fc"}
    assert result.max_error is not None
    assert result.max_error < 1e-10


class Asking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bn = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.fc(x)) / self.bn.num_features


@pytest.mark.parametrize("inplace", [False, True])
def test_a_model_that_asks_the_norm_for_something_can_not_lose_it(inplace):
    model, x = settled(Asking()), values(5, 4)
    before = copy.deepcopy(model)
    with pytest.raises(UserError, match=r"fold must leave a model that runs, but it raises AttributeError.*where="):
        fold(model, x, inplace=inplace)
    assert torch.equal(model(x), before(x))


@pytest.mark.parametrize("trainable", [False, True])
def test_what_remains_trains_as_the_norm_did(trainable):
    model = settled(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.BatchNorm2d(4), nn.ReLU()))
    result = fold(model.requires_grad_(trainable), values(2, 4, 3, 3), rest="affine")
    assert list(result.changed) == ["2"]
    assert [p.requires_grad for p in result.model[2].parameters()] == [trainable] * 2


class Masked(nn.Module):
    """Takes one tensor or two."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bn = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.bn(self.fc(x))
        return y if mask is None else y * mask[:, None]


@pytest.mark.parametrize("kind", [tuple, list, lambda pair: {"x": pair[0]}], ids=["tuple", "list", "dict"])
def test_batches_of_data_are_fed_as_a_loader_gives_them(kind):
    model, x = settled(Masked()), values(5, 4)
    labels_of_another_kind = ["a", "b", "c", "d", "e"]
    result = fold(model, x, data=[kind((x + 1, labels_of_another_kind))])
    assert result.changed == {"bn": "folded into fc"}
    assert result.max_error < 1e-12


def test_an_example_that_is_a_tuple_is_the_arguments_and_data_is_fed_by_the_given_forward():
    model, pair = settled(Masked()), (values(5, 4), torch.full((5,), torch.nan, dtype=torch.float64))
    fed: list[Any] = []

    def forward(model: nn.Module, batch: Any) -> Tensor:
        fed.append(batch)
        return model(*batch)

    assert fold(model, pair).changed
    assert not fed
    assert fold(model, pair, data=[pair], forward=forward).changed
    assert len(fed) == 4  # recorded, folded, and both networks on the batch
