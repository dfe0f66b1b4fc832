"""Each activation of the C kernels over its range, and each number of the 16-bit types, in and out.

A batch norm in inference with statistics 0 and 1 and eps = 0 is the identity, which leaves the activation bare.
"""

from __future__ import annotations

import oracle
import pytest
import torch
import torch.nn.functional as F
from _cases import instruction_set, needs_kernels  # noqa: F401
from torch import Tensor

from bnkit.ops import cpu, reference

pytestmark = needs_kernels


def identity(x: Tensor, activation: str | None = None, weight: float = 1.0) -> Tensor:
    mean, var, weights = torch.zeros(1), torch.ones(1), torch.full((1,), weight)
    return cpu.forward(x, mean, var, weights, None, False, 0.1, 0.0, activation, None, False)[0]


def slope(x: Tensor, activation: str) -> Tensor:
    mean, invstd = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    only_dx = (True, False, False, False)
    dx = cpu.backward(torch.ones_like(x), x, mean, invstd, None, None, False, activation, None, only_dx)[0]
    assert dx is not None
    return dx


def eager(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """The value and the slope of PyTorch's operator, in the type of x."""
    x = x.clone().requires_grad_()
    y = reference.ACTIVATIONS[activation](x)
    return y.detach(), torch.autograd.grad(y.sum(), x)[0]


@pytest.mark.parametrize("limit", [1.5, 40.0])
@pytest.mark.parametrize("activation", oracle.ACTIVATIONS[1:])
@pytest.mark.usefixtures("instruction_set")
def test_values_and_slopes(activation, limit):
    x = torch.linspace(-limit, limit, 20_001).view(-1, 1)
    true, theirs, ours = (
        eager(x.double(), activation),
        eager(x, activation),
        (identity(x, activation), slope(x, activation)),
    )
    for name, exact, other, found in zip(("value", "slope"), true, theirs, ours, strict=True):
        error, eager_error = (found - exact).abs().max().item(), (other - exact).abs().max().item()
        assert error <= 2 * eager_error + 3e-7, f"{name}: error {error:.1e}, eager's {eager_error:.1e}"


@pytest.mark.parametrize("activation", oracle.ACTIVATIONS[1:])
@pytest.mark.usefixtures("instruction_set")
def test_corners(activation):
    """Zero, where relu's and leaky_relu's slopes jump; hardswish's corners; numbers at the type's ends; no number."""
    x = torch.tensor([0.0, -0.0, 3.0, -3.0, 1e-37, -1e-37, 3e38, -3e38, torch.nan]).view(-1, 1)
    value, derivative = (t.float() for t in eager(x.double(), activation))
    torch.testing.assert_close(identity(x, activation), value, rtol=1e-6, atol=1e-8, equal_nan=True)
    torch.testing.assert_close(slope(x, activation)[:-1], derivative[:-1], rtol=1e-6, atol=1e-7)


def every(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(-1, 1)


def assert_same_bits(ours: Tensor, expected: Tensor) -> None:
    both_nan = ours.isnan() & expected.isnan()
    differ = (ours.view(torch.int16) != expected.view(torch.int16)) & ~both_nan
    assert not differ.any(), f"{ours[differ][:5]} instead of {expected[differ][:5]}"


@pytest.mark.usefixtures("instruction_set")
def test_every_float16_survives():
    x = every(torch.float16)
    x = x[x != 0]  # -0 - 0 + 0 is 0
    assert_same_bits(identity(x.view(-1, 1)), x.view(-1, 1))


@pytest.mark.usefixtures("instruction_set")
def test_every_bfloat16_survives():
    """The AVX-512 instruction takes subnormals for zero."""
    x = every(torch.bfloat16)
    x = x[~(x.abs() < torch.finfo(torch.bfloat16).tiny)]
    assert_same_bits(identity(x.view(-1, 1)), x.view(-1, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weight", [1 / 3, 1.0009765625 / 2, 3e-6, 1e4])
@pytest.mark.usefixtures("instruction_set")
def test_rounding_is_to_the_nearest_and_ties_to_even(dtype, weight):
    """Thirds fall anywhere between neighbours; the others give ties, subnormals and overflow."""
    x = every(dtype)
    exact = x.float() * torch.tensor(weight) + 0.0
    keep = x.isfinite() & ~(exact.abs() < torch.finfo(torch.bfloat16).tiny)
    assert_same_bits(identity(x[keep].view(-1, 1), weight=weight), exact[keep].view(-1, 1).to(dtype))


def test_the_definition_of_the_activations():
    x = torch.linspace(-5, 5, 101)
    assert torch.equal(reference.ACTIVATIONS["leaky_relu"](x), F.leaky_relu(x, 0.01))
    assert torch.equal(reference.ACTIVATIONS["gelu"](x), F.gelu(x, approximate="none"))
