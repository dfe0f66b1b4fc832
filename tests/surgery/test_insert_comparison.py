"""What insertion compares: outputs on every batch, in training mode on the first; and that it leaves no trace."""

from __future__ import annotations

import copy
import itertools
import random
from collections import UserDict
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

import bnkit
from bnkit.surgery import insert


@pytest.mark.parametrize("inplace", [False, True])
def test_the_difference_in_training_mode_is_measured(inplace):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Dropout(), nn.Flatten(), nn.Linear(288, 2)).double()
    batch = torch.randn(64, 3, 8, 8, dtype=torch.float64) * 2 + 1
    whole = insert(copy.deepcopy(model), batch, inplace=inplace)
    part = insert(copy.deepcopy(model), [batch[:4], batch[4:]], inplace=inplace)
    assert whole.training_error < 2e-4 < 2e-2 < part.training_error
    assert whole.model.training
    assert not int(whole.model[0].bn.num_batches_tracked)
    x, new = batch[:4], part.model.train()
    torch.manual_seed(1)
    expected = model(x)
    torch.manual_seed(1)
    error = (new(x) - expected).abs().max() / expected.abs().max()
    assert 0.1 < part.training_error / error < 10  # another dropout
    assert f"training_error {part.training_error:.1e}" in repr(part)


class Averaging(nn.Module):
    """In training mode it moves an average of a weight, counts, draws random numbers, and returns what it is told."""

    def __init__(self, returned: Callable[[Tensor], object] = lambda y: y) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        self.average, self.steps, self.returned = copy.deepcopy(self.net).requires_grad_(False), 0, returned

    def forward(self, x: Tensor) -> object:
        y = self.net(x)
        if not self.training:
            return y
        self.steps += 1
        with torch.no_grad():
            self.average[0].weight.lerp_(self.net[0].weight + 1, 0.1)
        return self.returned(y * (1 + random.random() + float(np.random.rand())))


@pytest.mark.parametrize("inplace", [False, True])
def test_nothing_is_left_of_the_run_in_training_mode(inplace):
    model = Averaging()
    before = copy.deepcopy(model.average.state_dict())
    python, array = random.getstate(), np.random.get_state()[1].copy()
    batch = torch.randn(64, 3)
    result = insert(model, batch, where="net*", inplace=inplace)
    for network in (model, result.model):
        assert network.steps == 0
        assert all(torch.equal(before[key], value) for key, value in network.average.state_dict().items())
    assert result.training_error < 0.02  # the same random numbers
    assert (random.getstate(), np.random.get_state()[1].tolist()) == (python, array.tolist())


LENGTHS = itertools.count(1)


@pytest.mark.parametrize("returned", [lambda y: {"loss": 0.5}, lambda y: y * torch.inf, lambda y: y[: next(LENGTHS)]])
def test_where_training_mode_gives_nothing_to_compare_no_difference_is_reported(returned):
    torch.manual_seed(0)
    assert insert(Averaging(returned), [torch.randn(8, 3), torch.randn(8, 3) + 3], where="net*").training_error is None


def test_where_training_mode_cannot_run_no_difference_is_reported():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    assert insert(model, [torch.randn(1, 3), torch.randn(8, 3)]).training_error is None


def test_layers_that_are_held_in_eval_mode_stay_so_in_the_run_in_training_mode():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    model[1].running_mean -= 3
    batch = torch.randn(64, 3)
    model[1].eval()
    held = insert(model, batch).training_error
    assert held < 0.02
    assert insert(model.eval(), batch[:3]).training_error > 0.02


class Remembering(nn.Module):
    """In eval mode too its output depends on the batch before."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
        self.register_buffer("state", torch.zeros(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.first(x) + self.state
        self.state.copy_(z.detach().mean(0))
        return self.last(z), self.state


def test_a_model_that_remembers_the_batch_before():
    model = Remembering()
    assert insert(model, [torch.randn(8, 3) for _ in range(3)]).max_error < 1e-5
    assert not model.state.any()


def test_a_batch_on_which_the_output_is_zero():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 32, 3, bias=False), nn.ReLU(), nn.Conv2d(32, 8, 1, bias=False))
    assert insert(model, [torch.randn(8, 3, 6, 6) + 0.3, torch.zeros(1, 3, 6, 6)]).max_error < 1e-5


def test_a_model_and_data_made_in_inference_mode():
    with torch.inference_mode():
        layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1)
        model, data = nn.Sequential(*layers).eval(), [torch.randn(8, 3, 8, 8) for _ in range(2)]
    assert insert(model, data, inplace=True).max_error < 1e-5


def test_insertion_waits_for_no_other_process():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)  # in which collectives do nothing
    try:
        assert insert(model, torch.randn(8, 3), norm="sync").training_error is None
    finally:
        dist.destroy_process_group()
    assert insert(model, torch.randn(8, 3), norm="sync").training_error is not None


def test_outputs_are_compared_on_every_batch_that_is_kept(monkeypatch):
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    data = [torch.randn(8, 3), torch.randn(8, 3), torch.full((8, 3), 5.0)]

    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        is_wrong = hasattr(model[0], "bn") and bool((batch == 5).all())
        return model(batch) * (2 if is_wrong else 1)

    with pytest.raises(bnkit.FailedCheck, match="must leave the outputs as they were"):
        insert(model, data, forward=forward)
    monkeypatch.setattr("bnkit.surgery._calibration._KEPT_BYTES", 8 * 5 * 4)
    assert insert(model, data, forward=forward).max_error < 1e-5


@pytest.mark.parametrize("form", [lambda x: x, lambda x: UserDict(input=x), lambda x: [x, UserDict(label=x)]])
def test_a_loader_that_fills_the_same_tensor_again(form):
    buffer, whole = torch.empty(8, 3), torch.randn(24, 3)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    new = insert(model, (form(buffer.copy_(part)) for part in whole.split(8))).model
    torch.testing.assert_close(new[0].bn.running_var, model[0](whole).var(0), rtol=1e-4, atol=0)
