from __future__ import annotations

import copy
import pickle

import pytest
import timm.layers
import torch
import torchvision
from torch import nn

import bnkit
from bnkit import UserError
from bnkit.surgery import convert, freeze, unfreeze


def net(norm=nn.BatchNorm2d) -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), norm(4), nn.ReLU(), norm(4)).train()
    with torch.no_grad():
        for i in (1, 3):
            model[i].running_mean.normal_()
            model[i].running_var.uniform_(0.5, 2)
            model[i].weight.uniform_(0.5, 2)
    model[1].momentum = 0.3
    model[3].bias.requires_grad_(False)
    return model


def image():
    return torch.randn(4, 3, 5, 5)


def facts(model: nn.Module) -> list[tuple]:
    return [
        (
            type(m),
            m.momentum,
            m.eps,
            m.training,
            {name: value for name, value in vars(m).items() if not name.startswith("_")},
            [p.requires_grad for p in m.parameters()],
            [t.tolist() for t in m.state_dict().values()],
        )
        for m in model.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm)
    ]


NORMS = [nn.BatchNorm2d, bnkit.nn.BatchNorm2d, bnkit.nn.GhostBatchNorm, bnkit.nn.SyncBatchNorm, nn.SyncBatchNorm]
NORMS += [timm.layers.BatchNormAct2d]


@pytest.mark.parametrize("norm", NORMS, ids=lambda n: f"{n.__module__.split('.')[0]}-{n.__name__}")
def test_frozen_through_training_and_undone_exactly(norm):
    model, x = net(norm), image()
    model[3].eval()
    before = facts(model)
    frozen = freeze(model).model.train()
    expected = copy.deepcopy(model).eval()(x)
    statistics = [b.clone() for b in frozen.buffers()]
    torch.testing.assert_close(frozen(x), expected)
    assert all(torch.equal(a, b) for a, b in zip(statistics, frozen.buffers(), strict=True))
    assert [name for name, p in frozen.named_parameters() if p.requires_grad] == ["0.weight", "0.bias"]
    assert list(frozen.state_dict()) == list(model.state_dict())
    assert facts(model) == before
    assert facts(unfreeze(frozen).model) == before


def test_statistics_alone_and_affine_alone():
    model = net()
    statistics = freeze(model, affine=False).model.train()
    assert isinstance(statistics[1], bnkit.nn.FrozenBatchNorm2d)
    assert [p.requires_grad for p in statistics[1].parameters()] == [True, True]
    affine = freeze(model, statistics=False).model
    assert type(affine[1]) is nn.BatchNorm2d
    assert [p.requires_grad for p in affine[3].parameters()] == [False, False]
    assert [p.requires_grad for p in unfreeze(affine).model[3].parameters()] == [True, False]
    both = freeze(statistics).model
    half = unfreeze(both, statistics=False).model
    assert isinstance(half[1], bnkit.nn.FrozenBatchNorm2d)
    assert half[1].weight.requires_grad
    assert facts(unfreeze(half).model) == facts(model)
    half = unfreeze(both, affine=False).model
    assert type(half[1]) is nn.BatchNorm2d
    assert not half[1].weight.requires_grad
    assert facts(unfreeze(half).model) == facts(model)


def test_affine_memory_survives_a_conversion():
    model = net()
    frozen = freeze(model, statistics=False).model
    other = convert(convert(frozen, "sync").model, "torch").model
    assert not other[1].weight.requires_grad
    assert facts(unfreeze(other).model) == facts(model)


def test_in_place_with_an_optimizer():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.1)
    parameters = list(model.parameters())
    result = freeze(model, inplace=True)
    assert result.model is model
    before = model[1].weight.clone()
    model(image()).square().mean().backward()
    optimizer.step()
    assert torch.equal(model[1].weight, before)
    unfreeze(model, inplace=True)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


def test_pickled_in_between():
    model = net(bnkit.nn.GhostBatchNorm)
    frozen = pickle.loads(pickle.dumps(freeze(model).model))
    assert facts(unfreeze(frozen).model) == facts(model)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, bnkit.nn.BatchNorm1d])
def test_a_bare_layer(norm):
    layer = norm(3).train()
    frozen = freeze(layer).model
    assert not frozen.train().training
    thawed = unfreeze(frozen).model
    assert type(thawed) is norm
    assert thawed.training


def test_the_models_mode_may_change_in_between():
    frozen = freeze(net()).model.eval()
    assert not unfreeze(frozen).model[1].training
    assert unfreeze(frozen.train()).model[1].training


def test_where_twice_and_reports():
    model = net()
    result = freeze(model, where="1")
    assert result.changed == {"1": "froze statistics and affine"}
    again = freeze(result.model)
    assert again.skipped == {"1": "is frozen already"}
    assert set(again.changed) == {"3"}
    assert unfreeze(model).skipped == {"1": "is not frozen", "3": "is not frozen"}
    with pytest.raises(UserError, match="leave one True"):
        freeze(model, False, False)


def test_layers_built_frozen():
    model = nn.Sequential(bnkit.nn.FrozenBatchNorm2d(3, trainable=False), torchvision.ops.FrozenBatchNorm2d(3)).train()
    thawed = unfreeze(model).model
    assert [type(m) for m in thawed] == [bnkit.nn.BatchNorm2d] * 2
    assert all(p.requires_grad for p in thawed.parameters())
    assert all(m.training for m in thawed)


def test_without_running_statistics():
    model = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False))
    assert "keeps no running statistics" in freeze(model).skipped["0"]
    assert freeze(model, statistics=False).changed == {"0": "froze affine"}
