"""What the reference promises beyond functional.batch_norm, whose tests run on it: see test_functional.py."""

from __future__ import annotations

import pytest
import torch

from bnkit.moments import Moments
from bnkit.ops import ACTIVATIONS, reference


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_torchs_defaults(name):
    z = torch.linspace(-5, 5, 101, dtype=torch.float64)
    expected = {
        "relu": torch.nn.ReLU(),
        "leaky_relu": torch.nn.LeakyReLU(0.01),
        "elu": torch.nn.ELU(),
        "silu": torch.nn.SiLU(),
        "gelu": torch.nn.GELU(approximate="none"),
        "hardswish": torch.nn.Hardswish(),
        "sigmoid": torch.nn.Sigmoid(),
        "tanh": torch.nn.Tanh(),
    }[name](z)
    assert torch.equal(ACTIVATIONS[name](z), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("momentum", [0.25, torch.tensor(0.25)], ids=["number", "tensor"])
def test_update_running_statistics(momentum, dtype):
    mean, var = torch.tensor([1.0, -4.0], dtype=dtype), torch.tensor([1.0, 2.0], dtype=dtype)
    moments = Moments(5, torch.tensor([5.0, 4.0]), torch.tensor([20.0, 40.0]))
    reference.update_running_statistics(mean, var, moments, momentum)
    assert mean.tolist() == [2.0, -2.0]
    assert var.tolist() == [0.75 + 0.25 * 5, 1.5 + 0.25 * 10]  # 20/(5 - 1) and 40/(5 - 1)
    assert mean.dtype == var.dtype == dtype


def test_normalize_rounds_once():
    """In bfloat16, y is the float32 result rounded: weight, bias, residual and activation see no rounded values."""
    x, residual = torch.randn(64, 3).bfloat16(), torch.randn(64, 3).bfloat16()
    arguments = (torch.randn(3), torch.rand(3) + 0.5, torch.randn(3), torch.randn(3), "gelu")
    rounded = reference.normalize(x, *arguments, residual)
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(rounded, reference.normalize(x.float(), *arguments, residual.float()).bfloat16())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_are_rounded_once(dtype):
    """What comes through the mean and the deviation is added to the rest before it is rounded to the type of x."""
    x, dy = torch.randn(2, 50).to(dtype), torch.randn(2, 50).to(dtype)
    found = []
    for values in (x.requires_grad_(), x.detach().float().requires_grad_()):
        y = reference.batch_norm(values, None, None, None, None, True, 0.1, 1e-5, None, None)
        found += torch.autograd.grad(y, values, dy.to(y.dtype))
    assert torch.equal(found[0], found[1].to(dtype))
