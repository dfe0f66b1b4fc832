"""FrozenBatchNorm and its 1d, 2d and 3d: nothing moves the statistics."""

from __future__ import annotations

import pytest
import torch
from fvcore.nn.precise_bn import update_bn_stats
from torch import nn
from torch.optim.swa_utils import update_bn
from torchvision.ops import FrozenBatchNorm2d as TorchvisionFrozen

import bnkit.nn

SHAPES = {"FrozenBatchNorm1d": (6, 4, 5), "FrozenBatchNorm2d": (6, 4, 5, 3), "FrozenBatchNorm3d": (3, 4, 2, 3, 5)}
CLASSES = ["FrozenBatchNorm", *SHAPES]


def frozen(name="FrozenBatchNorm2d", **options):
    layer = getattr(bnkit.nn, name)(4, **options)
    with torch.no_grad():
        for tensor in (*layer.parameters(), layer.running_mean, layer.running_var):
            tensor.uniform_(0.5, 2.0)
        layer.num_batches_tracked.fill_(7)
    return layer


def data(name="FrozenBatchNorm2d", dtype=torch.float32):
    return torch.randn(SHAPES.get(name, (6, 4, 5)), dtype=dtype) * 3 + 1


def state(layer):
    return {name: tensor.clone() for name, tensor in layer.state_dict().items()}


def assert_state(layer, wanted):
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, wanted[name]), f"{name} moved"


@pytest.mark.parametrize("name", CLASSES)
def test_output_and_gradients_by_formula(name):
    """In float64: dx = weight · invstd · dy, as nothing depends on the batch."""
    layer, x = frozen(name, dtype=torch.float64), data(name, torch.float64).requires_grad_()
    dy, shape = torch.randn_like(x), (1, 4) + (1,) * (x.dim() - 2)
    y = layer.train()(x)
    y.backward(dy)
    invstd = 1 / torch.sqrt(layer.running_var + 1e-5)
    xhat = (x.detach() - layer.running_mean.view(shape)) * invstd.view(shape)
    dims = (0, *range(2, x.dim()))
    torch.testing.assert_close(y, layer.weight.view(shape) * xhat + layer.bias.view(shape))
    torch.testing.assert_close(x.grad, (layer.weight * invstd).view(shape) * dy)
    torch.testing.assert_close(layer.weight.grad, (dy * xhat).sum(dims))
    torch.testing.assert_close(layer.bias.grad, dy.sum(dims))


@pytest.mark.parametrize("name", CLASSES)
def test_survives_train_and_forward_passes(name):
    model = nn.Sequential(frozen(name))
    before = state(model)
    for mode in (True, False, True):
        model.train(mode)
        assert not model[0].training
        model[0].training = True  # as tools that set flags one by one do
        model(data(name))
    assert_state(model, before)


@pytest.mark.parametrize("name", SHAPES)
def test_one_sample_and_equal_results_alone_or_in_a_batch(name):
    layer, x = frozen(name), data(name)
    torch.testing.assert_close(torch.cat([layer(one) for one in x.split(1)]), layer(x))


@pytest.mark.parametrize("name", SHAPES)
def test_tools_that_estimate_statistics_leave_it_alone(name):
    """torch's `update_bn` resets every batch norm; fvcore sets momentum to 1 in those in training mode."""
    model, loader = nn.Sequential(frozen(name)), [data(name) for _ in range(3)]
    before = state(model)
    update_bn(loader, model)
    model.train()
    update_bn_stats(model, loader, num_iters=2)
    model[0].reset_running_stats()
    assert_state(model, before)


@pytest.mark.parametrize("trainable", [True, False])
def test_trainable(trainable):
    layer = frozen(trainable=trainable)
    assert [p.requires_grad for p in layer.parameters()] == [trainable] * 2
    x = data().requires_grad_()
    layer(x).pow(2).sum().backward()
    assert (layer.weight.grad is not None) == trainable
    assert x.grad is not None


@pytest.mark.parametrize("name", SHAPES)
def test_loads_torchs_state_and_goes_back(name):
    theirs = getattr(nn, name.removeprefix("Frozen"))(4)
    theirs(data(name))
    layer = getattr(bnkit.nn, name)(4)
    layer.load_state_dict(theirs.state_dict(), strict=True)
    x = data(name)
    torch.testing.assert_close(layer.train()(x), theirs.eval()(x))
    theirs.load_state_dict(layer.state_dict(), strict=True)
    assert isinstance(layer, type(theirs))


@pytest.mark.parametrize("version", [None, 1, 2, 3])
def test_loads_torchvisions_state(version):
    """Which has no count; detectron2's neither, under version 3 of the module."""
    theirs = TorchvisionFrozen(4)
    for tensor in theirs.buffers():
        tensor.uniform_(0.5, 2.0)
    values = theirs.state_dict()
    if version is None:
        values = dict(values)  # as read from safetensors: without metadata
    else:
        values._metadata[""]["version"] = version
    layer = bnkit.nn.FrozenBatchNorm2d(4)
    layer.load_state_dict(values, strict=True)
    x = data()
    torch.testing.assert_close(layer.train()(x), theirs(x))
    theirs.load_state_dict(layer.state_dict(), strict=True)


def test_dimensions_are_checked_as_in_torch():
    with pytest.raises(ValueError, match="expected 4D input"):
        bnkit.nn.FrozenBatchNorm2d(4)(torch.zeros(3, 4))
    assert bnkit.nn.FrozenBatchNorm(4)(torch.zeros(3, 4, 1, 1, 1, 1)).shape == (3, 4, 1, 1, 1, 1)


def test_torchvisions_state_assigned_to_a_layer_without_memory():
    theirs = TorchvisionFrozen(4)
    theirs.running_var.uniform_(0.5, 2.0)
    layer = bnkit.nn.FrozenBatchNorm2d(4, device="meta")
    layer.load_state_dict(theirs.state_dict(), assign=True)
    assert layer.num_batches_tracked.device == layer.running_mean.device
    assert layer.num_batches_tracked == 0
    x = data()
    torch.testing.assert_close(layer(x), theirs(x))
    counted = frozen()
    counted.load_state_dict(theirs.state_dict(), assign=True)
    assert counted.num_batches_tracked == 7
