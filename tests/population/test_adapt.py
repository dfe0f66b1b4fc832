"""The blend, by its formula in float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from nets import batches, buffers, close, moments, net, randomized, same
from torch import nn

import bnkit
from bnkit import UserError
from bnkit.population import adapt


@pytest.mark.parametrize("n", [1, 5, 40])
@pytest.mark.parametrize("source_weight", [0, 1, 16, 256])
def test_one_batch_is_the_papers_formula(n, source_weight):
    """Schneider et al. 2020, equation 1, each layer behind layers already blended."""
    model = net().double()
    x = torch.randn(n, 3, 8, 8, dtype=torch.float64) + 2
    expected, z, w = copy.deepcopy(model).eval(), x, source_weight
    for i, module in enumerate(expected):
        if i in (1, 5):
            mean, var = moments(z)
            module.running_mean = (w * module.running_mean + n * mean) / (w + n)
            module.running_var = (w * module.running_var + n * var) / (w + n)
        with torch.no_grad():
            z = module(z)
    result = adapt(model, [x], source_weight)
    for i in (1, 5):
        close(model[i].running_mean, expected[i].running_mean, 1e-10)
        close(model[i].running_var, expected[i].running_var, 1e-10)
        assert model[i].num_batches_tracked == 3
    assert result.layers["1"].samples == n


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, bnkit.nn.BatchNorm2d, bnkit.nn.GhostBatchNorm])
def test_layerwise_over_batches_is_one_batch_of_all(norm):
    model, data = net(norm), batches(7, 2, 3, offset=3.0)
    other = copy.deepcopy(model)
    adapt(model, data, 16, "layerwise")
    adapt(other, [torch.cat(data)], 16)
    for a, b in zip(model.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


def test_first_layer_over_batches():
    model, data = net(), batches(7, 2, 3)
    old = model[1].running_mean.clone(), model[1].running_var.clone()
    target = moments(model[0](torch.cat(data)).detach())
    result = adapt(model, data)
    for now, before, new in zip((model[1].running_mean, model[1].running_var), old, target, strict=True):
        close(now, (16 * before.double() + 12 * new) / 28)
    close(result.layers["1"].measured[0], target[0])
    assert result.method == "adapted, pooled"


def test_infinite_source_weight_changes_nothing():
    model = net()
    before = buffers(model)
    adapt(model, batches(4), math.inf)
    assert same(before, model.buffers())


def test_a_single_vector_tells_nothing_about_variance():
    layer = randomized(nn.BatchNorm1d(3))
    mean, var = layer.running_mean.clone(), layer.running_var.clone()
    x = torch.randn(1, 3)
    adapt(layer, [x], 4)
    close(layer.running_mean, (4 * mean.double() + x[0]) / 5)
    close(layer.running_var, var)


@pytest.mark.parametrize("shape", [(8, 3), (8, 3, 50), (8, 3, 5, 10)])
def test_padded_samples_weigh_as_samples(shape):
    layer, x = bnkit.nn.MaskedBatchNorm(3), torch.randn(shape) + 4
    mask = torch.rand(8, *shape[2:]) < 0.9
    mask[2:4] = False
    mask[0] = mask[5] = True
    n = int(mask.unsqueeze(1).flatten(1).any(1).sum())
    result = adapt(layer, [{"input": x, "mask": mask}, {"input": x, "mask": mask & False}], source_weight=16)
    assert result.layers[""].samples == n
    mean = moments(x.movedim(1, -1)[mask].T[None])[0]
    close(layer.running_mean, n * mean / (16 + n))


def test_samples_without_values_weigh_nothing():
    layer, x = randomized(nn.BatchNorm1d(3)), torch.randn(8, 3, 5)
    source = layer.running_mean.double()
    adapt(layer, [x, x[..., :0]], source_weight=8)
    close(layer.running_mean, (source + moments(x)[0]) / 2)


@pytest.mark.parametrize("method", ["pooled", "layerwise"])
def test_a_source_that_is_not_finite(method):
    model, other, data = net(), net(), batches(5, 3)
    other.load_state_dict(model.state_dict())
    model[1].running_var[2] = math.inf
    model[5].running_mean.fill_(math.nan)
    before = buffers(model)
    with pytest.raises(UserError, match=r"got NaN or infinity in those of 1: recalibrate .* source_weight=0"):
        adapt(model, data, method=method)
    assert str(before) == str(buffers(model))
    adapt(model, data, 0, method)
    adapt(other, data, 0, method)
    assert same(buffers(other), model.buffers())


def test_drift_is_that_of_the_domain_whatever_the_weight():
    model, data = net(), batches(9)
    one, other = (adapt(copy.deepcopy(model), data, w, "layerwise").layers["1"].distance for w in (1, 1000))
    assert one == pytest.approx(other)
    assert one > 0.1


def test_errors():
    with pytest.raises(UserError, match="source_weight must not be negative, got -1"):
        adapt(net(), batches(4), -1)
    with pytest.raises(UserError, match="unknown method 'moving'"):
        adapt(net(), batches(4), method="moving")
