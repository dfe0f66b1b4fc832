from __future__ import annotations

import copy

import pytest
import timm.layers
import torch
from nets import batches, buffers, net, randomized, same
from torch import nn

import bnkit
from bnkit import UserError
from bnkit.population import preserve_statistics

NORMS = [
    nn.BatchNorm2d,
    bnkit.nn.BatchNorm2d,
    bnkit.nn.GhostBatchNorm,
    bnkit.nn.BatchRenorm,
    bnkit.nn.DomainBatchNorm,
    bnkit.nn.MaskedBatchNorm,
    bnkit.nn.SyncBatchNorm,
    timm.layers.BatchNormAct2d,
]


class Foreign(nn.BatchNorm2d):
    """Updates its statistics whatever the flag says."""

    def forward(self, x):
        with torch.no_grad():
            self.running_mean.lerp_(x.mean((0, 2, 3)), 0.1)
        return (x - x.mean((0, 2, 3), keepdim=True)) * self.weight.view(1, -1, 1, 1)


@pytest.mark.parametrize("norm", [*NORMS, Foreign], ids=lambda n: f"{n.__module__.split('.')[0]}-{n.__name__}")
def test_outputs_and_gradients_are_those_of_training_and_statistics_stay(norm):
    model = net(norm).train()
    model[3].eval()
    plain, x = copy.deepcopy(model), batches(6)[0]
    before, tensors = buffers(model), list(model.buffers())
    with preserve_statistics(model):
        y = model(x)
    expected = plain(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    expected.backward(dy)
    torch.testing.assert_close(y, expected)
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    assert same(before, model.buffers())
    assert all(a is b for a, b in zip(tensors, model.buffers(), strict=True))
    model(x)
    assert not same(before, model.buffers())


def test_time_steps_stay_too():
    model = bnkit.nn.BNLSTM(3, 4, max_length=5)
    before = buffers(model)
    with preserve_statistics(model):
        model(torch.randn(5, 6, 3))
    assert same(before, model.buffers())


def test_eval_mode_uses_the_statistics():
    model, x = net().eval(), batches(4)[0]
    expected = model(x)
    with preserve_statistics(model):
        torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


def test_it_nests_and_survives_an_exception():
    model = net().train()
    before = buffers(model)

    def interrupted():
        with preserve_statistics(model):
            with preserve_statistics(model):
                model(batches(3)[0])
            model(batches(3)[0])
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert same(before, model.buffers())
    assert model[1].track_running_stats


def test_compiled():
    model = net(nn.BatchNorm2d).train()
    compiled = torch.compile(model, backend="eager")
    compiled(batches(4)[0])
    before = buffers(model)
    with preserve_statistics(compiled):
        compiled(batches(4)[0])
    assert same(before, model.buffers())
    compiled(batches(4)[0])
    assert not same(before, model.buffers())


def test_lazy_layers_make_their_statistics_before():
    model, x = nn.Sequential(nn.LazyBatchNorm2d(), nn.LazyBatchNorm2d()), batches(4)[0]
    with pytest.raises(UserError, match=r"0 has no statistics yet: run .* eval mode"), preserve_statistics(model):
        pass  # pragma: no cover
    model.eval()(x)
    before = buffers(model.train())
    with preserve_statistics(model):
        model(x)
    assert same(before, model.buffers())


def test_momentum_none():
    layer = randomized(nn.BatchNorm1d(3, momentum=None))
    before = buffers(layer)
    with preserve_statistics(layer):
        layer(torch.randn(4, 3))
    assert same(before, layer.buffers())
