"""functional.batch_norm: what it refuses, and in which words."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import bnkit
from bnkit.functional import batch_norm

pytestmark = pytest.mark.usefixtures("backend")

X = torch.zeros(4, 3)
STATISTICS = (torch.zeros(3), torch.ones(3))
VECTORS = dict.fromkeys(("running_mean", "running_var", "weight", "bias"), torch.ones(3))
# Arguments, type, and message. Where PyTorch raises it too, its type and leading words are the same.
ERRORS = {
    "one value a channel": (
        lambda f: f(torch.zeros(1, 3), None, None, training=True),
        ValueError,
        r"Expected more than 1 value per channel when training, got input size torch.Size\(\[1, 3\]\)",
    ),
    "one value a channel of an image": (
        lambda f: f(torch.zeros(1, 3, 1, 1), None, None, training=True),
        ValueError,
        "Expected more than 1 value per channel when training",
    ),
    "eps 0 in training": (
        lambda f: f(X, None, None, training=True, eps=0.0),
        ValueError,
        r"eps must be positive( during training)?, but got 0\.0",
    ),
    "negative eps in training": (
        lambda f: f(X, None, None, training=True, eps=-1.0),
        ValueError,
        r"eps must be positive( during training)?, but got -1\.0",
    ),
    "negative eps": (
        lambda f: f(X, *STATISTICS, eps=-1.0),
        ValueError,
        r"eps must be (non-negative|positive), but got -1\.0",
    ),
    "no mean": (lambda f: f(X, None, None), RuntimeError, "running_mean must be defined in evaluation mode"),
    "no var": (lambda f: f(X, STATISTICS[0], None), RuntimeError, "running_var must be defined in evaluation mode"),
    "only a mean": (
        lambda f: f(X, STATISTICS[0], None, training=True),
        ValueError,
        "running_mean and running_var must either both be None or neither be None",
    ),
    "mean of another size": (
        lambda f: f(X, torch.zeros(5), torch.ones(5)),
        RuntimeError,
        "running_mean should contain 3 elements not 5",
    ),
    "var of another size": (
        lambda f: f(X, torch.zeros(3), torch.ones(5), training=True),
        RuntimeError,
        "running_var should contain 3 elements not 5",
    ),
    "weight of another size": (
        lambda f: f(X, *STATISTICS, torch.ones(4)),
        RuntimeError,
        "weight should contain 3 elements not 4",
    ),
    "bias of another size": (
        lambda f: f(X, *STATISTICS, None, torch.ones(4)),
        RuntimeError,
        "bias should contain 3 elements not 4",
    ),
    "integers": (lambda f: f(X.long(), *STATISTICS), NotImplementedError, '"batch_norm" not implemented for'),
    **{
        f"{name} that requires a gradient, {training=}": (
            lambda f, m=mean, v=var, t=training: f(
                X, torch.zeros(3, requires_grad=m), torch.ones(3, requires_grad=v), training=t
            ),
            RuntimeError,
            f"not differentiable with respect to argument '{name}'",
        )
        for name, mean, var in (("running_mean", True, False), ("running_var", False, True))
        for training in (True, False)
    },
    "complex numbers": (lambda f: f(X.cfloat(), *STATISTICS), NotImplementedError, '"batch_norm" not implemented for'),
}
OUR_ERRORS = {
    "no channels": (
        lambda f: f(torch.zeros(3), *STATISTICS),
        ValueError,
        r"shape \(N, C\) or \(N, C, \*\), got \(3,\)",
    ),
    "one number": (lambda f: f(torch.tensor(1.0), None, None, training=True), ValueError, r"got \(\)"),
    "unknown activation": (
        lambda f: f(X, *STATISTICS, activation="rellu"),
        ValueError,
        "unknown activation 'rellu': did you mean relu or",
    ),
    "sparse": (
        lambda f: f(X.to_sparse(), *STATISTICS),
        NotImplementedError,
        r'^"batch_norm" not implemented for torch.sparse_coo; convert the input, as with x.to_dense\(\).$',
    ),
    "of oneDNN": (
        lambda f: f(torch.zeros(4, 3, 2, 2).to_mkldnn(), *STATISTICS, *STATISTICS),
        NotImplementedError,
        '"batch_norm" not implemented for torch._mkldnn; convert the input',
    ),
    **{
        f"{name} of another shape": (
            lambda f, n=name: f(**{"x": torch.zeros(4, 3, 2, 2), **VECTORS, n: torch.ones(1, 3, 1, 1)}, training=True),
            RuntimeError,
            rf"^{name} should be of shape \(3,\), got \(1, 3, 1, 1\): pass {name}.flatten\(\).$",
        )
        for name in ("running_mean", "running_var", "weight", "bias")
    },
    "residual of another shape": (
        lambda f: f(X, *STATISTICS, residual=torch.zeros(4, 1)),
        ValueError,
        r"residual must have the input's shape \(4, 3\), got \(4, 1\)",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("function", [batch_norm, F.batch_norm], ids=["bnkit", "torch"])
def test_errors_are_those_of_torch(name, function):
    call, kind, message = ERRORS[name]
    with pytest.raises(kind, match=message):
        call(function)


@pytest.mark.parametrize("name", OUR_ERRORS)
def test_errors_of_our_own(name):
    call, kind, message = OUR_ERRORS[name]
    with pytest.raises(kind, match=message):
        call(batch_norm)


@pytest.mark.parametrize("layer", [bnkit.nn.BatchNorm1d, bnkit.nn.BatchNorm2d, bnkit.nn.BatchNorm3d])
def test_a_layer_tells_its_dimensions_and_channels(layer):
    dims = int(layer.__name__[-2])
    with pytest.raises(RuntimeError, match=r"should contain 3 elements not 4, .*: make it of 3 channels, or move"):
        layer(4)(torch.randn(2, 3, *[5] * dims))
    with pytest.raises(ValueError, match=rf"^expected .*D input \(got {dims + 3}D input\): reshape it, or"):
        layer(4)(torch.randn(2, 4, *[5] * (dims + 1)))


def test_running_statistics_may_require_a_gradient_where_none_is_recorded():
    mean, var = torch.zeros(3, requires_grad=True), torch.ones(3, requires_grad=True)
    x = torch.randn(4, 3)
    with torch.no_grad():
        torch.testing.assert_close(batch_norm(x, mean, var), F.batch_norm(x, mean, var))


def test_an_error_leaves_the_running_statistics_alone():
    mean, var = torch.zeros(3), torch.ones(3)
    with pytest.raises(ValueError, match="Expected more than 1 value"):
        batch_norm(torch.ones(1, 3), mean, var, training=True)
    assert torch.equal(mean, torch.zeros(3))
    assert torch.equal(var, torch.ones(3))
