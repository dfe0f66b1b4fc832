"""PyTorch's own samples for `torch.nn.functional.batch_norm` (its `OpInfo` data base), run on ours."""

from __future__ import annotations

import pytest
import torch
from oracle import assert_near
from torch.testing._internal.common_methods_invocations import op_db

from bnkit.functional import batch_norm

pytestmark = pytest.mark.usefixtures("backend")

(OP,) = (op for op in op_db if op.name == "nn.functional.batch_norm" and not op.variant_test_name)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SAMPLES = len(list(OP.sample_inputs("cpu", torch.float32)))


def sample(index: int, dtype: torch.dtype):
    return list(OP.sample_inputs("cpu", dtype, requires_grad=True))[index]


def results(function, made, dy):
    x, running, parameters = made.input, [t if t is None else t.clone() for t in made.args[:2]], made.args[2:]
    y = function(x, *running, *parameters, **made.kwargs)
    inputs = [t for t in (x, *parameters) if t is not None]
    gradients = torch.autograd.grad(y, inputs, dy, allow_unused=True, materialize_grads=True)
    return [t for t in (y.detach(), *running, *gradients) if t is not None]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("index", range(SAMPLES))
def test_as_accurate_as_torch(index, dtype):
    made = sample(index, dtype)
    dy = torch.randn(made.input.shape).to(dtype)
    theirs = results(torch.nn.functional.batch_norm, made, dy)
    exact = results(torch.nn.functional.batch_norm, made.transform(_double), dy.double())
    ours = results(batch_norm, made, dy)
    for position, (tensor, eager, true) in enumerate(zip(ours, theirs, exact, strict=True)):
        if dtype == torch.float64:
            torch.testing.assert_close(tensor, true, msg=lambda m, i=position: f"result {i}: {m}")
        else:
            assert_near(f"result {position}", tensor, eager, true, scale=made.input.abs().sum().item())


def _double(value):
    return value.detach().double().requires_grad_(value.requires_grad) if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("index", range(SAMPLES))
def test_gradients(index):
    """First and second derivatives, in reverse and in forward mode, as the entry declares."""
    assert OP.supports_forward_ad
    assert OP.supports_fwgrad_bwgrad
    made = sample(index, torch.float64)
    inputs = [t for t in (made.input, *made.args[2:]) if t is not None]
    present = [t is not None for t in (made.input, *made.args[2:])]

    def function(*values):
        values = iter(values)
        x, *parameters = (next(values) if here else None for here in present)
        running = [t if t is None else t.clone() for t in made.args[:2]]
        return batch_norm(x, *running, *parameters, **made.kwargs)

    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, check_fwd_over_rev=True, fast_mode=True)
