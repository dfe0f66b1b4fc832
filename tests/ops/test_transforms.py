"""Derivatives of many cotangents at once, of dual ones, and of tensors whose memory does not hold their value.

By value against torch.nn in float64. The forward pass is a backend's, outside of the transform.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import bnkit.nn
from bnkit.functional import batch_norm
from bnkit.ops import cpu

pytestmark = pytest.mark.usefixtures("backend")

Function = Callable[[Tensor], Tensor]
X, DY = torch.randn(2, 6, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
MANY = torch.stack([DY, 2 * DY + X, X.sin()])
RESIDUAL = X.flip(0)
WEIGHT, BIAS = torch.tensor([[0.5, -2.0, 3.0], [1.0, 0.0, -1.0]], dtype=torch.float64)
STATISTICS = BIAS / 2, WEIGHT.abs()


def theirs(x: Tensor, weight: Tensor = WEIGHT, *, training: bool = True) -> Tensor:
    statistics = (None, None) if training else STATISTICS
    return F.batch_norm(x, *statistics, weight, BIAS, training)


def wide(function: Function, x: Tensor) -> Tensor:
    """The function of planes large enough for the kernels to keep a mask under ReLU."""
    return function(torch.cat([x * k for k in range(1, 6)], -1)).unflatten(-1, (5, -1)).sum(-2)


NO = (None, None)
OURS: dict[str, tuple[Function, Function]] = {
    "training": (lambda x: batch_norm(x, None, None, WEIGHT, BIAS, training=True), theirs),
    "inference": (lambda x: batch_norm(x, *STATISTICS, WEIGHT, BIAS), lambda x: theirs(x, training=False)),
    "activation and residual": (
        lambda x: batch_norm(x, None, None, WEIGHT, BIAS, training=True, activation="tanh", residual=RESIDUAL * x),
        lambda x: torch.tanh(theirs(x) + RESIDUAL * x),
    ),
    "relu and residual": (
        lambda x: wide(lambda z: batch_norm(z, *NO, WEIGHT, BIAS, training=True, activation="relu", residual=z**2), x),
        lambda x: wide(lambda z: torch.relu(theirs(z) + z**2), x),
    ),
    "residual of an inference": (
        lambda x: batch_norm(X, *STATISTICS, WEIGHT, BIAS, residual=x * x),
        lambda x: theirs(X, training=False) + x * x,
    ),
    "inplace": (
        lambda x: batch_norm(x, None, None, WEIGHT, BIAS, training=True, activation="leaky_relu", inplace=True),
        lambda x: F.leaky_relu(theirs(x)),
    ),
    "inplace in inference": (
        lambda x: batch_norm(x, *STATISTICS, WEIGHT, BIAS, activation="elu", inplace=True),
        lambda x: F.elu(theirs(x, training=False)),
    ),
    "composed": (
        lambda x: batch_norm(x, None, None, WEIGHT, BIAS, training=True, activation="elu"),
        lambda x: F.elu(theirs(x)),
    ),
    "operator": (
        lambda x: torch.ops.bnkit.batch_norm(x, None, None, WEIGHT, BIAS, True, 0.1, 1e-5, "tanh", None),
        lambda x: theirs(x).tanh(),
    ),
}


def backward_of(function: Function, **options) -> Function:
    """dx as a function of dy."""
    x = X.clone().requires_grad_()
    y = function(x)
    return lambda dy: torch.autograd.grad(y, x, dy, retain_graph=True, **options)[0]


def squared(function: Function) -> Function:
    return lambda dy: function(dy).pow(2).sum()


def dual(function: Function) -> tuple[Tensor, Tensor]:
    backward = backward_of(function)
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(backward(forward_ad.make_dual(DY, X)))[:2]


FIRST = {
    "jacobian": lambda f: torch.autograd.functional.jacobian(lambda x: f(x).flatten()[:10], X, vectorize=True),
    "is_grads_batched": lambda f: backward_of(f, is_grads_batched=True)(MANY),
    "vmap": lambda f: torch.vmap(backward_of(f))(MANY),
    "vmap in vmap": lambda f: torch.vmap(torch.vmap(backward_of(f)))(torch.stack([MANY, -MANY])),
    "jvp": lambda f: torch.func.jvp(backward_of(f), (DY,), (X,)),
    "dual cotangent": dual,
    "functionalize": lambda f: torch.func.functionalize(backward_of(f))(DY),
}
SECOND = {
    "hessian": lambda f: torch.autograd.functional.hessian(lambda x: f(x).pow(3).sum(), X, vectorize=True),
    "grad": lambda f: torch.func.grad(squared(backward_of(f, create_graph=True)))(DY),
    "create_graph": lambda f: torch.autograd.functional.jacobian(
        lambda x: torch.autograd.functional.vjp(f, x, DY, create_graph=True)[1].flatten()[:5], X, vectorize=True
    ),
}
# The forward pass within the transform.
AROUND = {
    "vmap": lambda f: torch.vmap(f)(MANY),
    "grad": lambda f: torch.func.grad(lambda x: f(x).pow(3).sum())(X),
    "jvp": lambda f: torch.func.jvp(f, (X,), (DY,)),
    "jacrev": lambda f: torch.func.jacrev(lambda x: f(x).sum(0))(X),
    "jacfwd": lambda f: torch.func.jacfwd(lambda x: f(x).sum(0))(X),
}


@pytest.mark.parametrize("transform", FIRST)
@pytest.mark.parametrize("name", OURS)
def test_first_derivatives(name, transform):
    ours, expected = OURS[name]
    torch.testing.assert_close(FIRST[transform](ours), FIRST[transform](expected))


def repeated(function: Function) -> Function:
    return lambda x: checkpoint(function, x, use_reentrant=False)


@pytest.mark.parametrize("transform", ["is_grads_batched", "vmap", "vmap in vmap", "dual cotangent"])
@pytest.mark.parametrize("name", [name for name in OURS if name != "operator"])
def test_checkpointing(name, transform):
    """Repeated within the transform, the forward pass has to keep what it kept outside."""
    ours, expected = OURS[name]
    torch.testing.assert_close(FIRST[transform](repeated(ours)), FIRST[transform](repeated(expected)))


def test_inplace_refuses_to_be_repeated_on_other_tensors_than_it_had():
    """In `jvp` what is computed is wrapped; the reference would keep its input, where the output is asked for."""
    with pytest.raises(ValueError, match=r"cannot be repeated by activation checkpointing .*: use inplace=False"):
        FIRST["jvp"](repeated(lambda x: OURS["inplace"][0](x.sin())))


@pytest.mark.parametrize("transform", SECOND)
@pytest.mark.parametrize("name", [name for name in OURS if "inplace" not in name])
def test_second_derivatives(name, transform):
    ours, expected = OURS[name]
    torch.testing.assert_close(SECOND[transform](ours), SECOND[transform](expected))


@pytest.mark.parametrize("transform", AROUND)
@pytest.mark.parametrize("name", OURS)
def test_the_forward_pass_within(name, transform):
    ours, expected = OURS[name]
    torch.testing.assert_close(AROUND[transform](ours), AROUND[transform](expected))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("inplace", [True, False])
def test_a_layer(inplace, training):
    """`gradcheck` compares batched gradients with those of one cotangent after the other."""
    layer = bnkit.nn.BatchNorm1d(3, inplace=inplace).double().train(training)
    parameters = [WEIGHT.clone().requires_grad_(), BIAS.clone().requires_grad_()]

    def function(x, weight, bias):
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(function, (X.clone().requires_grad_(), *parameters), check_batched_grad=True)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [None, "tanh"])
def test_second_derivatives_of_the_residual_alone(activation, training):
    def second(function):
        residual = RESIDUAL.clone().requires_grad_()
        (first,) = torch.autograd.grad(function(residual).pow(3).sum(), residual, create_graph=True)
        return first, *torch.autograd.grad(first.pow(2).sum(), residual)

    statistics = (None, None) if training else STATISTICS
    act = torch.tanh if activation else lambda z: z
    ours = second(lambda r: batch_norm(X, *statistics, training=training, activation=activation, residual=r))
    torch.testing.assert_close(ours, second(lambda r: act(theirs(X, None, training=training) + r - BIAS.view(3, 1))))


def test_second_derivatives_within_checkpointing():
    """Which hooks into what is saved; transforms refuse that."""

    def penalty(function):
        def forward(x):
            (dx,) = torch.autograd.grad(function(x).pow(3).sum(), x, create_graph=True)
            return dx.pow(2).sum()

        x = X.clone().requires_grad_()
        return torch.autograd.grad(checkpoint(forward, x, use_reentrant=False), x)[0]

    ours, expected = OURS["activation and residual"]
    torch.testing.assert_close(penalty(ours), penalty(expected))


def negated(tensor: Tensor) -> Tensor:
    """The same values as a view that negates what is in memory, as `z.conj().imag` is one; here next to each other."""
    view = torch._neg_view(-tensor)
    assert view.is_neg()
    assert view.is_contiguous()
    return view


def results(x, dy, weight, bias, residual, mean, var, *, training, inplace=False):
    leaves = [t if t is None else t.detach().requires_grad_() for t in (x, weight, bias, residual)]
    x, weight, bias, residual = leaves
    options = {"training": training, "residual": residual, "inplace": inplace}
    y = batch_norm(x, None if training else mean, None if training else var, weight, bias, **options)
    return y.detach(), *torch.autograd.grad(y, [t for t in leaves if t is not None], dy)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("index", range(7), ids=["x", "dy", "weight", "bias", "residual", "mean", "var"])
def test_a_negated_view(index, training):
    tensors = [X, DY, WEIGHT, BIAS, RESIDUAL, *STATISTICS]
    wanted = results(*tensors, training=training)
    torch.testing.assert_close(wanted[0], theirs(X, training=training) + RESIDUAL)
    tensors[index] = negated(tensors[index])
    torch.testing.assert_close(results(*tensors, training=training), wanted)


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("make", [negated, lambda dy: torch._efficientzerotensor(dy.shape, dtype=dy.dtype)])
def test_a_cotangent_without_its_own_memory(make, inplace):
    rest = (WEIGHT, BIAS, None, None, None)
    ours = results(X, make(DY), *rest, training=True, inplace=inplace)
    x = X.clone().requires_grad_()
    (dx,) = torch.autograd.grad(theirs(x), x, make(DY).clone())
    torch.testing.assert_close(ours[1], dx)


@pytest.mark.parametrize("residual", [None, RESIDUAL])
def test_zeros_without_memory(residual):
    zeros = torch._efficientzerotensor(X.shape, dtype=X.dtype)
    y = batch_norm(zeros, *STATISTICS, WEIGHT, BIAS, residual=residual)
    torch.testing.assert_close(y, theirs(torch.zeros_like(X), training=False) + (0 if residual is None else residual))
    y = batch_norm(X, *STATISTICS, WEIGHT, BIAS, residual=zeros)
    torch.testing.assert_close(y, theirs(X, training=False))


@pytest.mark.skipif(not cpu.available(), reason="installed without the C kernels")
def test_the_operator_under_vmap_looks_after_running_statistics():
    def normalize(x, mean, var):
        return torch.ops.bnkit.batch_norm(x, mean, var, None, None, True, 0.1, 1e-5, None, None)

    mean, var = torch.zeros(3, 3, dtype=torch.float64), torch.ones(3, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="only one running_mean"):
        torch.vmap(normalize, (0, None, None))(MANY, mean[0], var[0])
    torch.vmap(normalize)(MANY, mean, var)
    torch.testing.assert_close(mean, 0.1 * MANY.mean((1, 3)))
