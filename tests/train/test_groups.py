from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import bnkit.nn
from bnkit.train import parameter_groups


def names(model: nn.Module, groups: list[dict]) -> list[tuple[list[str], float]]:
    name = {id(parameter): name for name, parameter in model.named_parameters()}
    return [([name[id(parameter)] for parameter in group["params"]], group["weight_decay"]) for group in groups]


@pytest.mark.parametrize(
    "norm",
    [
        lambda: bnkit.nn.BatchNorm2d(4, activation="relu"),
        lambda: nn.BatchNorm2d(4),
        lambda: nn.SyncBatchNorm(4),
        lambda: nn.InstanceNorm2d(4, affine=True),
        lambda: nn.GroupNorm(2, 4),
        lambda: nn.LayerNorm([4, 3, 3]),
        lambda: nn.RMSNorm([4, 3, 3]),
    ],
)
def test_norms_and_biases_are_spared(norm: Callable[[], nn.Module]) -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), norm(), nn.Linear(3, 3))
    spared = [name for name, _ in model.named_parameters() if name not in ("0.weight", "2.weight")]
    assert "1.weight" in spared
    assert names(model, parameter_groups(model, 0.1)) == [(["0.weight", "2.weight"], 0.1), (spared, 0.0)]


def test_attention_s_input_bias_is_a_bias() -> None:
    model = nn.MultiheadAttention(4, 1)
    assert names(model, parameter_groups(model, 0.1))[1][0] == ["in_proj_bias", "out_proj.bias"]


def test_shared_parameters_come_once_and_a_norm_s_stay_spared() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.LayerNorm(4), nn.PReLU(4))
    model[1].weight = model[0].weight
    model[3].weight = model[2].weight
    assert names(model, parameter_groups(model, 0.1)) == [(["0.weight"], 0.1), (["2.weight", "2.bias"], 0.0)]


def test_frozen_parameters_and_empty_groups_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model[0].requires_grad_(False)
    assert names(model, parameter_groups(model, 0.1)) == [(["1.weight", "1.bias"], 0.0)]


def test_a_decay_of_their_own_for_norms_and_biases() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    everything = ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert names(model, parameter_groups(model, 0.1, norm_weight_decay=0.01))[1] == (everything[1:], 0.01)
    assert names(model, parameter_groups(model, 0.1, norm_weight_decay=0.1)) == [(everything, 0.1)]
    assert names(model, parameter_groups(model, 0.0)) == [(everything, 0.0)]


def test_only_weights_shrink() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD(parameter_groups(model, 0.1), lr=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, before[name] * (0.95 if name == "0.weight" else 1.0))
