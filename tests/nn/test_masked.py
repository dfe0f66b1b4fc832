"""MaskedBatchNorm against torch's batch norm on the positions of data alone, in float64."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

import bnkit.nn


def make(**options):
    layer = bnkit.nn.MaskedBatchNorm(4, **options)
    with torch.no_grad():
        for tensor in (*layer.parameters(), layer.running_mean, layer.running_var):
            tensor.uniform_(0.5, 2.0)
    return layer


def exact(layer, x, mask, dy):
    """By gathering the data into a matrix of (positions, C)."""
    x, weight, bias = (t.detach().double().requires_grad_() for t in (x, layer.weight, layer.bias))
    mean, var = layer.running_mean.double().clone(), layer.running_var.double().clone()
    rows = nn.functional.batch_norm(x.movedim(1, -1)[mask], mean, var, weight, bias, layer.training, 0.1)
    y = torch.zeros_like(x.movedim(1, -1))
    y[mask] = rows
    y = y.movedim(-1, 1)
    y.backward(dy.double())
    return {"y": y.detach(), "dx": x.grad, "dw": weight.grad, "db": bias.grad, "mean": mean, "var": var}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("channel_dimension", [True, False])
@pytest.mark.parametrize("shape", [(9, 4), (5, 4, 7), (3, 4, 5, 6)], ids=str)
def test_equals_batch_norm_of_the_data_alone(shape, channel_dimension, dtype, training):
    layer = make(dtype=dtype).train(training)
    x = torch.randn(shape, dtype=dtype) * 3 + 2
    mask = torch.rand(shape[0], *shape[2:]) < 0.6
    x = torch.where(mask.unsqueeze(1), x, torch.nan)  # padding has no influence, whatever it holds
    dy = torch.randn_like(x)
    wanted = exact(layer, x, mask, dy)
    x.requires_grad_()
    y = layer(x, mask.unsqueeze(1) if channel_dimension else mask)
    y.backward(torch.where(mask.unsqueeze(1), dy, torch.nan))  # nor has what comes back from there
    tolerance = {"atol": 2e-5, "rtol": 2e-5} if dtype == torch.float32 else {"atol": 1e-11, "rtol": 1e-11}
    ours = {"y": y, "dx": x.grad, "dw": layer.weight.grad, "db": layer.bias.grad}
    ours |= {"mean": layer.running_mean, "var": layer.running_var}
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor.double(), wanted[name], msg=lambda m, n=name: f"{n}: {m}", **tolerance)
    assert layer.num_batches_tracked == int(training)


@pytest.mark.parametrize("mask", [None, "all"])
def test_without_padding_it_is_batch_norm(mask):
    ours, theirs = make(), nn.BatchNorm1d(4)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(5, 4, 6)
    everything = None if mask is None else torch.ones(5, 6, dtype=torch.bool)
    torch.testing.assert_close(ours(x, everything), theirs(x))
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor)


def test_a_mask_may_leave_dimensions_out():
    layer, x = make(affine=False), torch.randn(3, 4, 5, 6)
    samples = torch.tensor([True, False, True])
    y = layer(x, samples.view(3, 1, 1, 1))
    torch.testing.assert_close(y[samples], nn.functional.batch_norm(x[samples], None, None, training=True))
    columns = torch.rand(3, 1, 6) < 0.5
    torch.testing.assert_close(make(affine=False)(x, columns), make(affine=False)(x, columns.expand(3, 5, 6)))


@pytest.mark.parametrize("valid", [0, 1])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_too_few_positions_change_nothing(valid, momentum):
    layer = make(momentum=momentum)
    layer(torch.randn(5, 4))
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    x, mask = torch.randn(5, 4, requires_grad=True), torch.zeros(5, dtype=torch.bool)
    mask[:valid] = True
    y = layer(x, mask)
    y.backward(torch.randn_like(y))
    assert torch.equal(y[valid:], torch.zeros(5 - valid, 4))
    assert torch.equal(y[:valid], layer.bias.detach().expand(valid, 4))
    assert torch.equal(x.grad, torch.zeros_like(x))
    assert torch.equal(layer.weight.grad, torch.zeros(4))
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_running_statistics_by_hand():
    """Of 1, 3 and padding: mean 2, unbiased variance 2."""
    layer = bnkit.nn.MaskedBatchNorm(1)
    layer(torch.tensor([[1.0], [3.0], [100.0]]), torch.tensor([True, True, False]))
    assert layer.running_mean.item() == pytest.approx(0.2)
    assert layer.running_var.item() == pytest.approx(0.9 + 0.1 * 2)


def test_momentum_none_is_the_mean_over_batches():
    layer, mask = bnkit.nn.MaskedBatchNorm(2, momentum=None), torch.rand(6, 8, 5) < 0.7
    data = torch.randn(6, 8, 2, 5)
    for x, m in zip(data, mask, strict=True):
        layer(x, m)
    rows = [x.movedim(1, -1)[m] for x, m in zip(data, mask, strict=True)]
    torch.testing.assert_close(layer.running_mean, torch.stack([r.mean(0) for r in rows]).mean(0))
    torch.testing.assert_close(layer.running_var, torch.stack([r.var(0) for r in rows]).mean(0))


def test_large_mean_small_deviation():
    """E[x²] - E[x]² would be noise here."""
    layer, mask = bnkit.nn.MaskedBatchNorm(1), torch.arange(100) < 60
    x = (torch.randn(100, 1, dtype=torch.float64) * 1e-2 + 1e3).float()
    wanted = nn.functional.batch_norm(x[mask].double(), None, None, training=True)
    torch.testing.assert_close(layer(x, mask)[mask].double(), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("length", [1, 9])
def test_padding_does_not_change_the_result(length):
    layer, x = make(), torch.randn(3, 4, 5)
    padded = torch.cat([x, torch.full((3, 4, length), 7.0)], 2)
    mask = (torch.arange(5 + length) < 5).expand(3, -1)
    wanted = make()
    wanted.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(padded, mask)[..., :5], wanted(x))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(5, 6), "a mask is boolean, True where there is data, got torch.float32: pass mask.bool"),
        (torch.ones(5, 4, 6, dtype=torch.bool), r"has shape \(5, 6\) or \(5, 1, 6\), got \(5, 4, 6\)"),
        (torch.ones(6, dtype=torch.bool), r"got \(6,\): it marks positions, not channels"),
        (torch.ones(1, 6, dtype=torch.bool), r"got \(1, 6\)"),
        (torch.ones(5, 7, dtype=torch.bool), r"got \(5, 7\)"),
    ],
)
def test_wrong_masks_are_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        make()(torch.randn(5, 4, 6), mask)


def test_vmap():
    layer, batches, mask = make(), torch.randn(3, 5, 4, 6), torch.rand(3, 5, 6) < 0.7
    count = layer.num_batches_tracked.clone()
    with pytest.raises(ValueError, match="there is only one running_mean and running_var to update"):
        torch.func.vmap(layer)(batches, mask)
    assert layer.num_batches_tracked == count
    untracked = bnkit.nn.MaskedBatchNorm(4, track_running_stats=False)
    for norm in (layer.eval(), untracked):
        wanted = torch.stack([norm(x, m) for x, m in zip(batches, mask, strict=True)])
        torch.testing.assert_close(torch.func.vmap(norm)(batches, mask), wanted)


def test_as_keras():
    """Keras keeps its statistics with the complement of our momentum, and the biased variance."""
    os.environ.setdefault("KERAS_BACKEND", "torch")
    keras = pytest.importorskip("keras")
    theirs, ours = keras.layers.BatchNormalization(momentum=0.9, epsilon=1e-5), bnkit.nn.MaskedBatchNorm(4)
    x, mask = torch.randn(5, 7, 4), torch.rand(5, 7) < 0.6
    y, wanted = ours(x.movedim(-1, 1), mask).movedim(1, -1), torch.as_tensor(theirs(x, training=True, mask=mask))
    torch.testing.assert_close(y[mask], wanted[mask].cpu(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.running_mean, torch.as_tensor(theirs.moving_mean.value).cpu())
