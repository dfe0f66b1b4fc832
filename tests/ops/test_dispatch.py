"""The wiring of backends, with one written from the contract alone, in plain formulas without derivatives."""

from __future__ import annotations

import itertools

import oracle
import pytest
import torch
from oracle import Case, make_case
from torch.autograd import forward_ad

from bnkit import ops
from bnkit.ops import dispatch, reference

SLOPES = {None: torch.ones_like, "relu": lambda z: (z > 0).to(z.dtype), "tanh": lambda z: 1 - z.tanh() ** 2}


class Formulas:
    """A backend of the contract's formulas in float64, that counts its calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def supports(self, x, parameters, residual):
        return residual is None or residual.dtype == x.dtype

    def forward(
        self, x, running_mean, running_var, weight, bias, training, momentum, eps, activation, residual, for_backward
    ):
        self.calls.append("forward")
        assert not torch.is_grad_enabled() or not x.requires_grad
        assert isinstance(momentum, float)
        dims, n = (0, *range(2, x.dim())), x.numel() // x.shape[1]
        mean, var = (x.mean(dims), x.var(dims, correction=0)) if training else (running_mean, running_var)
        if training and running_mean is not None:
            running_mean.data.mul_(1 - momentum).add_(momentum * mean)
            running_var.data.mul_(1 - momentum).add_(momentum * var * n / (n - 1))
        mean, invstd = mean.clone(), (var + eps).rsqrt()
        z = self._z(x, mean, invstd, weight, bias, residual)[1]
        y = reference.ACTIVATIONS.get(activation, lambda z: z)(z).to(x.dtype)
        return y, mean, invstd, None if activation is None else residual

    def backward(self, dy, x, mean, invstd, weight, bias, training, activation, kept, needs):
        self.calls.append("backward")
        assert not torch.is_grad_enabled()
        dims, shape, n = (0, *range(2, x.dim())), (1, -1) + (1,) * (x.dim() - 2), x.numel() // x.shape[1]
        xhat, z = self._z(x, mean, invstd, weight, bias, kept)
        g = dy * SLOPES[activation](z)
        dbias, dweight = g.sum(dims), (g * xhat).sum(dims)
        scale = (invstd if weight is None else invstd * weight).view(shape)
        through = (dbias.view(shape) + xhat * dweight.view(shape)) / n if training else 0.0
        found = (scale * (g - through), g, dweight, dbias)
        return tuple(gradient if needed else None for gradient, needed in zip(found, needs, strict=True))

    def _z(self, x, mean, invstd, weight, bias, residual):
        shape = (1, -1) + (1,) * (x.dim() - 2)
        xhat = (x - mean.view(shape)) * invstd.view(shape)
        z = xhat if weight is None else xhat * weight.view(shape)
        z = z if bias is None else z + bias.view(shape)
        return xhat, z if residual is None else z + residual


@pytest.fixture
def formulas(monkeypatch):
    backend = Formulas()
    monkeypatch.setattr(dispatch, "BACKENDS", (backend,))
    return backend


def call(case: Case, function=ops.batch_norm) -> torch.Tensor:
    return function(
        case.x,
        case.running_mean,
        case.running_var,
        case.weight,
        case.bias,
        case.training,
        case.momentum,
        case.eps,
        case.activation,
        case.residual,
    )


CASES = list(itertools.product([True, False], ["both", "weight", "none"], [True, False], SLOPES))


@pytest.mark.parametrize(("training", "affine", "residual", "activation"), CASES)
def test_gradients_and_running_statistics(formulas, training, affine, residual, activation):
    case = make_case(
        (6, 3, 4, 4),
        dtype=torch.float64,
        affine=affine,
        residual=residual,
        training=training,
        activation=activation,
    )
    oracle.assert_as_accurate(oracle.run(case, call), case)
    assert formulas.calls == ["forward", "backward"]


@pytest.mark.parametrize(("training", "affine", "residual", "activation"), CASES)
def test_second_derivatives_are_the_references(formulas, training, affine, residual, activation):
    case = make_case(
        (4, 2, 2, 2),
        dtype=torch.float64,
        affine=affine,
        residual=residual,
        training=training,
        activation=activation,
    )
    names = [n for n in ("x", "weight", "bias", "residual") if getattr(case, n) is not None]
    ddx = [torch.randn_like(getattr(case, n)) for n in names]

    def second_derivatives(function):
        for name in names:
            setattr(case, name, getattr(case, name).detach().requires_grad_())
        inputs, dy = [getattr(case, n) for n in names], case.dy.clone().requires_grad_()
        first = torch.autograd.grad(call(case, function), inputs, dy, create_graph=True)
        product = sum((a * b).sum() for a, b in zip(first, ddx, strict=True))
        return first + torch.autograd.grad(product, [*inputs, dy], allow_unused=True, materialize_grads=True)

    case.momentum = 0.0
    for ours, wanted in zip(second_derivatives(ops.batch_norm), second_derivatives(reference.batch_norm), strict=True):
        torch.testing.assert_close(ours, wanted)
    assert formulas.calls == ["forward"]


@pytest.mark.parametrize("made_from_another", ["weight", "bias", "residual"])
def test_inputs_that_depend_on_each_other_are_told_apart(formulas, made_from_another):
    """A weight made from x, say: the second-order path must not count its share of the gradient of x twice."""
    x = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(8, 3, dtype=torch.float64)

    def first_derivatives(function):
        inputs = {"weight": weight, "bias": None, "residual": None}
        inputs[made_from_another] = weight.square() if made_from_another == "bias" else x.square()
        if made_from_another == "weight":
            inputs["weight"] = inputs["weight"].mean(0) * weight
        y = function(x, None, None, inputs["weight"], inputs["bias"], True, 0.1, 1e-5, "tanh", inputs["residual"])
        return torch.autograd.grad(y, (x, weight), dy, create_graph=True)

    for ours, wanted in zip(first_derivatives(ops.batch_norm), first_derivatives(reference.batch_norm), strict=True):
        torch.testing.assert_close(ours, wanted)


def test_only_the_gradients_needed_are_asked_for(formulas, monkeypatch):
    asked = []
    original = formulas.backward
    monkeypatch.setattr(formulas, "backward", lambda *a: asked.append(a[-1]) or original(*a))
    case = make_case((4, 3), dtype=torch.float64, residual=True)
    case.bias.requires_grad_()
    call(case).sum().backward()
    assert asked == [(False, False, False, True)]


@pytest.mark.parametrize("grad", [True, False])
def test_without_gradients_autograd_is_left_out(formulas, grad):
    case = make_case((4, 3), dtype=torch.float64)
    case.x.requires_grad_(not grad)
    with torch.set_grad_enabled(grad):
        y = call(case)
    assert not y.requires_grad
    assert formulas.calls == ["forward"]


def test_writing_to_the_running_statistics_shows_in_their_version(formulas):
    """So that autograd reports a pending backward pass that has saved them."""
    case = make_case((4, 3), dtype=torch.float64)
    before = case.running_mean._version, case.running_var._version
    call(case)
    assert case.running_mean._version > before[0]
    assert case.running_var._version > before[1]


def test_what_is_saved(formulas):
    """x, mean and invstd, the parameters, and a residual only under an activation."""
    for activation, sizes in ((None, [48, 3, 3, 3, 3]), ("relu", [48, 3, 3, 3, 3, 48])):
        saved = []
        case = make_case((4, 3, 2, 2), dtype=torch.float64, residual=True, activation=activation)
        case.x.requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(t.numel()) or t, lambda t: t):
            call(case)
        assert saved == sizes


class Subclass(torch.Tensor):
    pass


def _empty(case):
    case.x = case.dy = case.x[:0]


def _subclass(case):
    case.x = case.x.as_subclass(Subclass)


def _declined(case):
    case.residual = torch.zeros(case.x.shape, dtype=torch.float16)


@pytest.mark.parametrize("change", [_empty, _subclass, _declined])
def test_the_reference_serves_what_no_backend_takes(formulas, change):
    case = make_case((4, 3), dtype=torch.float64)
    change(case)
    call(case)
    assert formulas.calls == []


def test_the_reference_serves_transforms(formulas):
    x, mean, var = torch.randn(5, 4, 3), torch.zeros(3), torch.ones(3)

    def function(x):
        return ops.batch_norm(x, mean, var, None, None, False, 0.1, 1e-5, "relu", None)

    torch.vmap(function)(x)
    torch.func.grad(lambda x: function(x).sum())(x[0])
    torch.func.jvp(function, (x[0],), (x[1],))
    with forward_ad.dual_level():
        function(forward_ad.make_dual(x[0], x[1]))
    assert formulas.calls == []
    function(x[0])
    assert formulas.calls == ["forward"]


def test_the_first_backend_that_takes_the_call_serves_it(monkeypatch):
    first, second = Formulas(), Formulas()
    monkeypatch.setattr(first, "supports", lambda x, *_: x.dtype == torch.float32)
    monkeypatch.setattr(dispatch, "BACKENDS", (first, second))
    call(make_case((4, 3)))
    call(make_case((4, 3), dtype=torch.float64))
    assert (first.calls, second.calls) == (["forward"], ["forward"])


def test_momentum_given_as_a_tensor_reaches_a_backend_as_a_number(formulas):
    case = make_case((4, 3), dtype=torch.float64)
    case.momentum = torch.tensor(1.0)
    call(case)
    torch.testing.assert_close(case.running_mean, case.x.mean(0))


MANY = torch.randn(5, 4, 3)
REFUSED = {
    "vmap": lambda f: torch.vmap(f, (0, None, None))(MANY, torch.zeros(3), torch.ones(3)),
    "one of the two": lambda f: torch.vmap(f, (0, 0, None))(MANY, torch.zeros(5, 3), torch.ones(3)),
    "per-sample gradients": lambda f: torch.vmap(torch.func.grad(lambda x: f(x, torch.zeros(3), torch.ones(3)).sum()))(
        MANY
    ),
    "within another vmap": lambda f: torch.vmap(
        lambda m, v: torch.vmap(f, (0, None, None))(MANY, m, v), in_dims=(0, 0)
    )(torch.zeros(2, 3), torch.ones(2, 3)),
}


def trained(x, mean, var):
    return ops.batch_norm(x, mean, var, None, None, True, 0.1, 1e-5, None, None)


@pytest.mark.parametrize("name", REFUSED)
def test_vmap_refuses_to_update_one_statistic_from_many_batches(name):
    with pytest.raises(ValueError, match=r"only one running_mean .*stack_module_state.*track_running_stats=False"):
        REFUSED[name](trained)


def test_vmap_updates_statistics_that_it_maps_over():
    mean, var = torch.zeros(5, 3), torch.ones(5, 3)
    y = torch.vmap(trained)(MANY, mean, var)
    for i, x in enumerate(MANY):
        one_mean, one_var = torch.zeros(3), torch.ones(3)
        torch.testing.assert_close(y[i], trained(x, one_mean, one_var))
        torch.testing.assert_close((mean[i], var[i]), (one_mean, one_var))


def test_vmap_needs_no_statistics_of_its_own_in_inference_or_without_any():
    mean, var = torch.randn(3), torch.rand(3) + 0.5

    def inference(x, training, *running):
        return ops.batch_norm(x, *running, None, None, training, 0.1, 1e-5, None, None)

    for arguments in ((False, mean, var), (True, None, None)):
        together = torch.vmap(lambda x, a=arguments: inference(x, *a))(MANY)
        torch.testing.assert_close(together, torch.stack([inference(x, *arguments) for x in MANY]))
