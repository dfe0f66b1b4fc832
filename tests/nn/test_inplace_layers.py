"""`inplace=True` of the layers beyond `BatchNorm2d`: what it keeps, its gradients, and who refuses it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bnkit
from bnkit import UserError
from bnkit.surgery import convert, fuse

KEEPING_THE_OUTPUT = {
    "frozen": lambda **options: bnkit.nn.FrozenBatchNorm2d(4, **options),
    "renorm": lambda **options: bnkit.nn.BatchRenorm(4, r_max=2.0, d_max=1.0, **options),
    "domain": lambda **options: bnkit.nn.DomainBatchNorm(4, 2, **options),
    "recurrent": lambda **options: bnkit.nn.RecurrentBatchNorm(4, max_length=3, gamma=0.7, **options),
}


def kept(layer: nn.Module, x: Tensor) -> tuple[bool, bool]:
    """Whether the layer keeps its input, and whether its output, for the backward pass."""
    saved = set()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.add(t.data_ptr()) or t, lambda t: t):
        y = layer(x)
    return x.data_ptr() in saved, y.data_ptr() in saved


@pytest.mark.parametrize("name", KEEPING_THE_OUTPUT)
@pytest.mark.parametrize("activation", [None, "leaky_relu"])
def test_the_output_is_kept_and_gradients_stay(name, activation):
    torch.manual_seed(0)
    layer = KEEPING_THE_OUTPUT[name](activation=activation, inplace=True, dtype=torch.float64)
    plain = KEEPING_THE_OUTPUT[name](activation=activation, dtype=torch.float64)
    assert repr(layer).replace(", inplace=True", "") == repr(plain)
    plain.load_state_dict(layer.state_dict())
    shape = (6, 3, 4) if name == "recurrent" else (6, 4, 3, 5)
    x = torch.randn(shape, dtype=torch.float64)
    assert kept(copy.deepcopy(layer), x.clone().requires_grad_()) == (False, True)
    assert kept(copy.deepcopy(plain), x.clone().requires_grad_()) == (True, False)
    dy = torch.randn_like(x)
    gradients = []
    for module in (layer, plain):
        leaf = x.clone().requires_grad_()
        module(leaf).backward(dy)
        gradients.append([leaf.grad, *(parameter.grad for parameter in module.parameters())])
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(dict(layer.named_buffers()), dict(plain.named_buffers()))


@pytest.mark.parametrize("kind", [bnkit.nn.SyncBatchNorm, bnkit.nn.GhostBatchNorm, bnkit.nn.MaskedBatchNorm])
def test_layers_that_need_their_input_refuse(kind):
    with pytest.raises(UserError, match=rf"{kind.__name__} needs its input .*, got inplace=True: leave it False"):
        kind(4, inplace=True)


@pytest.mark.parametrize(
    ("to", "then"), [("ghost", False), ("sync", False), ("renorm", True), ("frozen", True), ("batch", True)]
)
def test_convert_carries_it_where_it_can_be(to, then):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), bnkit.nn.BatchNorm2d(4, activation="leaky_relu", inplace=True))
    converted: Any = convert(model, to).model
    assert converted[1].inplace is then
    assert converted(torch.randn(3, 3, 2, 2)).isfinite().all()
    back: Any = convert(converted, "batch").model
    assert back[1].inplace


def test_convert_drops_it_for_an_activation_that_cannot_be_undone():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), bnkit.nn.BatchNorm2d(4, inplace=True))
    converted: Any = convert(model, "batch", activation="relu").model
    assert converted[1].activation == "relu"
    assert not converted[1].inplace
    assert converted(torch.randn(3, 3, 2, 2)).min() == 0


def test_fuse_leaves_such_a_layer_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), bnkit.nn.BatchNorm2d(4, inplace=True), nn.ReLU())
    surgery = fuse(model, torch.randn(3, 3, 2, 2))
    assert "inplace=True" in surgery.skipped["1"]
    assert not surgery.changed
