"""Models that can't be run, or in part not be looked into; functions that read a shape alone; an odd optimizer."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import settled_models
import torch
from torch import Tensor, nn

from bnkit import UserError
from bnkit.graph import record
from bnkit.surgery import convert, fold, freeze, fuse, insert

VERBS = {
    "fold": fold,
    "fuse": fuse,
    "insert": lambda model, x: insert(model, [x]),
    "convert": lambda model, x: convert(model, "ghost", example=x),
}


def randomized(model: nn.Module) -> Any:
    return settled_models.settled(model, seed=1)


@pytest.mark.parametrize("verb", VERBS)
def test_a_model_without_values_is_refused(verb):
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with pytest.raises(UserError, match=r"must have values .* 0.weight is on the meta device: to_empty"):
        VERBS[verb](model, torch.randn(2, 3, 5, 5))
    assert all(parameter.is_meta for parameter in convert(model, "ghost").model.parameters())
    assert all(parameter.is_meta for parameter in freeze(model).model.parameters())


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("inplace", [False, True])
def test_lazy_layers_that_never_ran_are_refused(verb, inplace):
    if inplace and verb in ("insert", "convert"):
        pytest.skip("the same check")
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d())
    options = {"inplace": True} if inplace else {}
    with pytest.raises(UserError, match=r"0.weight has none yet: run it once on an example"):
        VERBS[verb](model, torch.randn(2, 3, 5, 5), **options)
    x = torch.randn(2, 3, 5, 5)
    model(x)
    VERBS[verb](model, x)


def test_a_scripted_part_is_left_as_it_is():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)))
    model = randomized(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), scripted))
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    expected = model(x)
    surgery = fold(model, x)
    assert surgery.changed == {"1": "folded into 0"}
    torch.testing.assert_close(surgery.model(x), expected)
    torch.testing.assert_close(fuse(model, x).model(x), expected)


class LeViTLinear(nn.Module):
    """As LeViT has them: tokens flattened for the batch norm, and put back by the shape of what went in."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.bn, self.head = nn.Linear(5, 6, bias=False), nn.BatchNorm1d(6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        x = self.bn(x.flatten(0, 1)).reshape_as(x)
        return self.head(x + torch.zeros_like(x))


def test_reading_a_shape_is_not_reading():
    model, x = randomized(LeViTLinear()), torch.randn(3, 4, 5, dtype=torch.float64)
    expected = model(x)
    surgery = fold(model, x)
    assert surgery.changed == {"bn": "folded into linear"}
    torch.testing.assert_close(surgery.model(x), expected)
    names = {op.name: op for op in record(model, x).operators}
    assert len(names["reshape_as"].inputs) == 1
    assert names["zeros_like"].inputs == ()


def test_a_batch_norm_goes_forward_through_reshape_as():
    class Reshaped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.linear = nn.BatchNorm1d(6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = x.relu()
            return self.linear(self.bn(x.flatten(0, 1)).reshape_as(x))

    model, x = randomized(Reshaped()), torch.randn(3, 4, 6, dtype=torch.float64)
    surgery = fold(model, x)
    assert surgery.changed == {"bn": "folded into linear"}
    torch.testing.assert_close(surgery.model(x), model(x))


@pytest.mark.parametrize("inplace", [False, True])
def test_lbfgs_trains_what_it_is_rebound_to(inplace):
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x, y = torch.randn(16, 3, dtype=torch.float64), torch.randn(16, 1, dtype=torch.float64)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)

    def step(network: nn.Module) -> float:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(network(x), y)
            loss.backward()
            return loss

        return optimizer.step(closure).item()

    step(model)
    frozen = [parameter.detach().clone() for parameter in model.parameters()]
    surgery = insert(model, [x], inplace=inplace)
    surgery.rebind(optimizer)
    new: Any = surgery.model
    before = {name: parameter.detach().clone() for name, parameter in new.named_parameters()}
    first = step(new)
    assert step(new) < first
    for name, parameter in new.named_parameters():
        assert not torch.equal(parameter, before[name]), name
    if not inplace:
        assert all(map(torch.equal, model.parameters(), frozen))


def test_lbfgs_keeps_its_history_where_shapes_stay():
    model: Any = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
    x = torch.randn(8, 3, dtype=torch.float64)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = network(x).pow(3).sum()
        loss.backward()
        return loss

    network = model
    optimizer.step(closure)
    surgery = convert(model, "ghost")
    network = surgery.rebind(optimizer) and surgery.model
    (key,) = optimizer.state
    assert key is next(network.parameters())
    steps = optimizer.state[key]["n_iter"]
    optimizer.step(closure)
    assert optimizer.state[key]["n_iter"] > steps


@pytest.mark.parametrize("training", [True, False])
def test_insertion_does_not_move_spectral_norm(training):
    torch.manual_seed(0)
    normed = nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 3, 3))
    model = nn.Sequential(normed, nn.ReLU(), nn.Conv2d(3, 2, 1)).double().train(training)
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    surgery = insert(model, [x])
    assert "0" in surgery.changed
    assert surgery.model.training is training
    torch.testing.assert_close(surgery.model.eval()(x), model.eval()(x), rtol=1e-10, atol=1e-10)


class Particular(nn.Module):
    """Runs as long as its layers are what it expects."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        if type(self.bn) is not nn.BatchNorm2d or list(self.head.children()):
            raise LookupError("not what it was")
        return self.head(self.bn(self.conv(x)).relu())


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("verb", ["convert", "insert"])
def test_a_model_that_no_longer_runs_is_one_error_and_left_as_it_was(verb, inplace):
    model, x = Particular().eval(), torch.randn(4, 3, 8, 8)
    before = model(x)
    change = {"convert": (convert, "ghost", {"example": x}), "insert": (insert, [x], {"where": "head"})}
    function, argument, options = change[verb]
    with pytest.raises(UserError, match=rf"{verb} must leave .* raises LookupError: not what it was; .*where="):
        function(model, argument, inplace=inplace, **options)
    assert torch.equal(model(x), before)
