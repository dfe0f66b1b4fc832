"""`inplace=True`: gradients rebuilt from the output, what is kept for them, and what is refused."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import bnkit.nn
from bnkit.functional import batch_norm
from bnkit.ops import INVERTIBLE

pytestmark = pytest.mark.usefixtures("backend")

# Of the largest gradient, measured against float64: a few units of the type in which y is kept.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def results(x: Tensor, weight: Tensor | None, bias: Tensor | None, dy: Tensor, **options) -> dict[str, Tensor]:
    tensors = {"x": x, "weight": weight, "bias": bias}
    leaves = {n: None if t is None else t.detach().clone().requires_grad_() for n, t in tensors.items()}
    statistics = torch.linspace(-1, 1, x.shape[1]).to(dy.dtype), torch.linspace(1, 2, x.shape[1]).to(dy.dtype)
    y = batch_norm(leaves["x"], *statistics, leaves["weight"], leaves["bias"], **options)
    y.backward(dy.to(y.dtype))
    gradients = {f"d{n}": leaf.grad for n, leaf in leaves.items() if leaf is not None}
    return {"y": y.detach(), **gradients, "running_mean": statistics[0], "running_var": statistics[1]}


def make(shape=(6, 5, 4, 3), dtype=torch.float32, layout=torch.contiguous_format):
    x = (3 + 2 * torch.randn(shape, dtype=torch.float64)).to(dtype)
    x = x.contiguous(memory_format=layout) if x.dim() == 4 else x
    sign = torch.tensor([1.0, -1.0]).repeat(shape[1])[: shape[1]]
    weight = sign * (torch.rand(shape[1]) + 0.25)
    bias, dy = torch.randn(shape[1]) / 2, torch.randn(shape)
    return x, *(t.double() if dtype == torch.float64 else t for t in (weight, bias, dy))


def kept(function) -> list[Tensor]:
    tensors: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: tensors.append(t) or t, lambda t: t):
        function()
    return tensors


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("activation", INVERTIBLE)
def test_values_and_gradients(activation, dtype, training):
    for layout in (torch.contiguous_format, torch.channels_last):
        x, weight, bias, dy = make(dtype=dtype, layout=layout)
        options = {"training": training, "activation": activation}
        ours = results(x, weight, bias, dy, **options, inplace=True)
        true = results(x.double(), weight.double(), bias.double(), dy.double(), **options)
        for name, tensor in ours.items():
            error = (tensor.double() - true[name]).abs().max() / true[name].abs().max()
            assert error < TOLERANCE[dtype], f"{name}: {error:.1e}"
        assert ours["dx"].dtype == dtype
        assert ours["dx"].stride() == x.stride()


@pytest.mark.parametrize("parameters", ["neither", "weight alone", "frozen"])
@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 7), (3, 5, 2, 3, 2)])
def test_shapes_and_parameters(shape, parameters):
    x, weight, bias, dy = make(shape)
    weight, bias = (None, None) if parameters == "neither" else (weight, None if "alone" in parameters else bias)
    if parameters == "frozen":
        leaf = x.clone().requires_grad_()
        batch_norm(leaf, None, None, weight, bias, training=True, activation="elu", inplace=True).backward(dy)
        expected = results(x, weight, bias, dy, training=True, activation="elu")["dx"]
        torch.testing.assert_close(leaf.grad, expected, rtol=1e-4, atol=1e-5)
        return
    options = {"training": True, "activation": "leaky_relu"}
    wanted = results(x, weight, bias, dy, **options)
    for name, tensor in results(x, weight, bias, dy, **options, inplace=True).items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_a_mean_far_from_zero():
    """x̂ is rebuilt as a deviation: in x itself, rounded, 5% of it would be lost."""
    x, weight, bias, dy = make(dtype=torch.float32)
    x = 1e4 + 1e-2 * x
    true = results(x.double(), weight.double(), bias.double(), dy.double(), training=True)["dx"]
    ours = results(x, weight, bias, dy, training=True, inplace=True)["dx"]
    assert (ours.double() - true).abs().max() < 1e-4 * true.abs().max()


def test_elu_where_the_output_is_rounded_to_minus_one():
    """log1p(-1) would be infinite."""
    x = torch.randn(64, 2)
    x[0] = -60.0
    weight = torch.full((2,), 6.0)
    found = results(x, weight, torch.zeros(2), torch.randn(64, 2), training=True, activation="elu", inplace=True)
    assert (found["y"][0] == -1).all()
    assert all(tensor.isfinite().all() for tensor in found.values())


@pytest.mark.parametrize("activation", INVERTIBLE)
def test_the_output_is_kept_and_the_input_is_not(activation):
    x, weight, bias, _ = make()
    x.requires_grad_()
    made: list[Tensor] = []

    def function(inplace):
        made.append(batch_norm(x, None, None, weight, bias, training=True, activation=activation, inplace=inplace))

    tensors = kept(lambda: function(True))
    assert [t.data_ptr() for t in tensors if t.numel() == x.numel()] == [made[-1].data_ptr()]
    large = [t.data_ptr() for t in kept(lambda: function(False)) if t.numel() == x.numel()]
    assert set(large) - {made[-1].data_ptr()}, "without it, more than the output is kept"


def test_the_input_is_not_written_to():
    x, weight, bias, _ = make()
    before = x.clone()
    batch_norm(x.requires_grad_(), None, None, weight, bias, training=True, activation="leaky_relu", inplace=True)
    assert torch.equal(x, before)


def test_writing_to_the_output_is_noticed():
    x, weight, bias, dy = make()
    y = batch_norm(x.requires_grad_(), None, None, weight, bias, training=True, inplace=True)
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(dy)


@pytest.mark.parametrize("weight", [0.0, 1e-30, 1e-5])
def test_the_input_is_kept_after_all_where_the_weight_is_too_small(weight):
    """As with weights that start at 0: the gradient of the weight needs x̂, of which y holds nothing."""
    x, weights, bias, dy = make()
    weights[1], bias[1] = weight, 1.0
    options = {"training": True, "activation": "leaky_relu"}
    wanted = results(x, weights, bias, dy, **options)
    for name, tensor in results(x, weights, bias, dy, **options, inplace=True).items():
        assert torch.equal(tensor, wanted[name]), name


def test_second_derivatives_are_refused():
    x, weight, bias, _ = make()
    y = batch_norm(x.requires_grad_(), None, None, weight, bias, training=True, inplace=True)
    with pytest.raises(ValueError, match="keeps no input for second derivatives; use inplace=False"):
        torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)


def test_what_cannot_be_undone_is_refused():
    x = torch.randn(4, 3)
    with pytest.raises(ValueError, match="one of None, 'leaky_relu', 'elu'; got 'relu'"):
        batch_norm(x, None, None, training=True, activation="relu", inplace=True)
    with pytest.raises(ValueError, match="cannot be combined with a residual"):
        batch_norm(x, None, None, training=True, residual=x, inplace=True)
    with pytest.raises(ValueError, match="activation that can be undone"):
        bnkit.nn.BatchNorm2d(3, activation="silu", inplace=True)
    with pytest.raises(ValueError, match="cannot be combined with a residual"):
        bnkit.nn.BatchNorm1d(3, inplace=True)(x, x)


def test_a_layer():
    conv, layer = nn.Conv2d(3, 5, 3), bnkit.nn.BatchNorm2d(5, activation="leaky_relu", inplace=True)
    assert repr(layer).endswith("activation=leaky_relu, inplace=True)")
    plain = bnkit.nn.BatchNorm2d(5, activation="leaky_relu")
    for twin in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        conv.zero_grad()
        plain.zero_grad()
        plain.reset_running_stats()
        x, dy = torch.randn(4, 3, 6, 6), torch.randn(4, 5, 4, 4)
        expected, y = plain(conv(x)), twin(conv(x))
        wanted = torch.autograd.grad(expected, (conv.weight, plain.weight, plain.bias), dy)
        found = torch.autograd.grad(y, (conv.weight, twin.weight, twin.bias), dy)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(twin.running_var, plain.running_var)
