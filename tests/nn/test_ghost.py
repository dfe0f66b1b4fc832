"""GhostBatchNorm against a loop of batch norms over `x.split(ghost_size)`, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bnkit.nn
from bnkit import functional


def split(x, ghost_size):
    """The ghosts, one after the other; a last one of a single value a channel joins the one before."""
    parts = list(x.split(ghost_size))
    if len(parts) > 1 and parts[-1].numel() == parts[-1].shape[1]:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts


def loop(x, layer, dy, ghost_size, mean, var):
    """Output, gradients and running statistics of torch's function, called for each ghost."""
    x, weight, bias = (t.detach().double().requires_grad_() for t in (x, layer.weight, layer.bias))
    mean, var = mean.double().clone(), var.double().clone()
    y = torch.cat([nn.functional.batch_norm(p, mean, var, weight, bias, True, 0.1) for p in split(x, ghost_size)])
    y.backward(dy.double())
    return {"y": y.detach(), "dx": x.grad, "dw": weight.grad, "db": bias.grad, "mean": mean, "var": var}


def make(**options):
    layer = bnkit.nn.GhostBatchNorm(5, **options)
    with torch.no_grad():
        for tensor in (*layer.parameters(), layer.running_mean, layer.running_var):
            tensor.uniform_(0.5, 2.0)
    return layer


SHAPES = {
    "vectors, whole ghosts": (24, 5),
    "vectors, ragged": (27, 5),
    "vectors, last of one": (25, 5),
    "vectors, two ghosts of 8 and 1": (9, 5),
    "sequences, ragged": (19, 5, 3),
    "sequences, last of one sample": (17, 5, 3),
    "images": (16, 5, 4, 3),
    "images, ragged": (21, 5, 4, 3),
    "images, smaller than a ghost": (6, 5, 4, 3),
    "volumes": (16, 5, 2, 3, 2),
}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_a_loop_over_the_ghosts(shape, dtype, layout, backend):
    layer = make(ghost_size=8, dtype=dtype)
    x = torch.randn(SHAPES[shape], dtype=dtype) * 3 + 2
    x[::3] += 5  # so that ghosts differ
    if layout == "channels_last":
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    elif layout == "sliced":
        x = torch.stack([x, x], -1)[..., 0]
    dy = torch.randn_like(x)
    wanted = loop(x, layer, dy, 8, layer.running_mean, layer.running_var)
    x.requires_grad_()
    y = layer(x)
    y.backward(dy)
    ours = {"y": y, "dx": x.grad, "dw": layer.weight.grad, "db": layer.bias.grad}
    ours |= {"mean": layer.running_mean, "var": layer.running_var}
    tolerance = {"atol": 2e-5, "rtol": 2e-5} if dtype == torch.float32 else {"atol": 1e-12, "rtol": 1e-12}
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor.double(), wanted[name], msg=lambda m, n=name: f"{n}: {m}", **tolerance)
    assert layer.num_batches_tracked == 1
    if layout == "channels_last" and x.dim() > 3:  # torch has no such memory format for sequences
        assert y.movedim(1, -1).is_contiguous()


def test_one_call_of_the_kernel_for_all_whole_ghosts(monkeypatch):
    calls, original = [], functional.batch_norm
    monkeypatch.setattr(
        functional, "batch_norm", lambda x, *a, **k: calls.append(tuple(x.shape)) or original(x, *a, **k)
    )
    layer = make(ghost_size=4)
    layer(torch.randn(40, 5, 3))
    assert calls == [(4, 50, 3)]
    layer(torch.randn(42, 5, 3))
    assert calls[1:] == [(4, 50, 3), (2, 5, 3)]


def test_running_statistics_by_hand():
    """Two ghosts, (1, 3) and (5, 9): means 2 and 7, unbiased variances 2 and 8, one after the other."""
    layer = bnkit.nn.GhostBatchNorm(1, ghost_size=2)
    layer(torch.tensor([[1.0], [3.0], [5.0], [9.0]]))
    assert layer.running_mean.item() == pytest.approx(0.2 * 0.9 + 0.7)
    assert layer.running_var.item() == pytest.approx((0.9 + 0.2) * 0.9 + 0.8)
    assert layer.num_batches_tracked.item() == 1


def test_momentum_none_is_the_mean_over_batches_of_the_mean_over_ghosts():
    layer = bnkit.nn.GhostBatchNorm(3, ghost_size=4, momentum=None)
    batches = torch.randn(20, 12, 3, dtype=torch.float64) * 2 + 1
    for x in batches:
        layer(x.float())
    ghosts = batches.view(20, 3, 4, 3)
    torch.testing.assert_close(layer.running_mean.double(), ghosts.mean((0, 1, 2)), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(layer.running_var.double(), ghosts.var(2).mean((0, 1)), atol=1e-6, rtol=1e-6)
    assert layer.num_batches_tracked == 20


def test_eval_is_that_of_batch_norm():
    layer, theirs = make(ghost_size=4), nn.BatchNorm1d(5)
    theirs.load_state_dict(layer.state_dict())
    x = torch.randn(11, 5)
    torch.testing.assert_close(layer.eval()(x), theirs.eval()(x))
    torch.testing.assert_close(layer(x[:1]), theirs(x[:1]))


def test_residual_belongs_to_its_sample():
    layer = make(ghost_size=4, activation="relu")
    plain = make(ghost_size=4)
    plain.load_state_dict(layer.state_dict())
    x, residual = torch.randn(2, 10, 5, 3)
    torch.testing.assert_close(layer(x, residual), (plain(x) + residual).relu())


def test_an_empty_batch_leaves_statistics_alone():
    layer = make(ghost_size=4)
    before = layer.running_mean.clone(), layer.running_var.clone()
    for shape in ((0, 5, 3), (12, 5, 0)):
        assert layer(torch.zeros(shape)).shape == shape
    assert torch.equal(layer.running_mean, before[0])
    assert torch.equal(layer.running_var, before[1])


@pytest.mark.parametrize("shape", [(99, 5, 3), (3, 5, 3), (1, 5, 3), (10, 10, 3), (10, 5)])
def test_a_residual_of_another_shape_is_refused(shape):
    layer = make(ghost_size=4)
    with pytest.raises(ValueError, match=r"residual must have the input's shape \(10, 5, 3\), got"):
        layer(torch.randn(10, 5, 3), torch.randn(shape))


@pytest.mark.parametrize("size", [8, 10])
@pytest.mark.parametrize("track_running_stats", [True, False])
def test_vmap_over_an_ensemble(track_running_stats, size):
    layers = [bnkit.nn.GhostBatchNorm(5, ghost_size=4, track_running_stats=track_running_stats) for _ in range(3)]
    for parameter in nn.ModuleList(layers).parameters():
        nn.init.normal_(parameter)
    state = torch.func.stack_module_state(layers)
    x = torch.randn(3, size, 5)
    for batches, dim in ((x, 0), (x[0], None)):  # a batch for each, and one for all

        def call(state, x):
            return torch.func.functional_call(layers[0], state, (x,))

        y = torch.func.vmap(call, in_dims=(0, dim))(state, batches)
        each = zip(layers, x if dim == 0 else [x[0]] * 3, strict=True)
        torch.testing.assert_close(y, torch.stack([layer(z) for layer, z in each]))
    for name, buffer in state[1].items():
        torch.testing.assert_close(buffer, torch.stack([layer.get_buffer(name) for layer in layers]))


def test_vmap_over_batches_needs_statistics_for_each():
    layer, batches = make(ghost_size=4), torch.randn(3, 8, 5)
    with pytest.raises(ValueError, match="there is only one running_mean"):
        torch.func.vmap(layer)(batches)
    layer = bnkit.nn.GhostBatchNorm(5, ghost_size=4, track_running_stats=False)
    torch.testing.assert_close(torch.func.vmap(layer)(batches), torch.stack([layer(x) for x in batches]))


@pytest.mark.parametrize(
    ("options", "x", "message"),
    [
        ({"ghost_size": 0}, None, "ghost_size must be an integer of at least 1, got 0"),
        ({"ghost_size": "a"}, None, "ghost_size must be an integer of at least 1, got 'a'"),
        ({"ghost_size": 2.5}, None, "ghost_size must be an integer of at least 1, got 2.5"),
        (
            {"ghost_size": 1},
            torch.zeros(6, 5),
            "got ghost_size=1 with input size .6, 5.: use a ghost_size of at least 2",
        ),
        ({"ghost_size": 4}, torch.zeros(1, 5), "Expected more than 1 value per channel"),
        ({"ghost_size": 4}, torch.zeros(8, 3), "expected 5 channels"),
    ],
)
def test_errors(options, x, message):
    with pytest.raises(ValueError, match=message):
        make(**options)(x)
