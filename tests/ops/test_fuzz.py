"""Any call that a user may make, forward and backward, beside the formulas in float64 and PyTorch's eager operators."""

from __future__ import annotations

import dataclasses
import os

import oracle
import pytest
import torch
from _cases import batch_norm, check, instruction_set, needs_kernels, only_kernels, poisoned  # noqa: F401
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import make_case

from bnkit.ops import dispatch

SMALL = st.integers(1, 12)
SHAPES = st.one_of(
    st.tuples(st.integers(2, 400), st.integers(1, 90)),
    st.tuples(SMALL, SMALL, SMALL),
    st.tuples(SMALL, st.integers(1, 40), SMALL, SMALL),
    st.tuples(st.integers(1, 3), SMALL, SMALL, SMALL, SMALL),
    st.tuples(st.integers(2, 60), st.sampled_from([1, 3, 513]), st.just(1), st.integers(1, 60)),
).filter(lambda shape: shape[0] * torch.Size(shape[2:]).numel() > 1)
LAYOUTS = st.sampled_from(["contiguous", "channels_last", "sliced", "transposed"])
CALLS = {
    "shape": SHAPES,
    "layouts": st.tuples(LAYOUTS, LAYOUTS, LAYOUTS),
    "dtype": st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    "activation": st.sampled_from(oracle.ACTIVATIONS),
    "affine": st.sampled_from(["both", "weight", "none"]),
    "training": st.booleans(),
    "tracked": st.booleans(),
    "residual": st.booleans(),
    "momentum": st.floats(0, 1),
    "eps": st.sampled_from([1e-5, 1e-3, 1.0]),
    "mean": st.sampled_from([0.0, 0.5, -40.0]),
    "seed": st.integers(0, 2**32),
}


def drawn_case(
    shape: tuple[int, ...], layouts: tuple[str, str, str], tracked: bool, seed: int, **options
) -> oracle.Case:
    """x, dy and residual each lie in a layout of their own."""
    torch.manual_seed(seed)
    case = make_case(shape, **options)
    for field, layout in zip(("x", "dy", "residual"), layouts, strict=True):
        tensor, has_format = getattr(case, field), layout != "channels_last" or len(shape) in (4, 5)
        if tensor is not None and has_format:
            case = dataclasses.replace(case, **{field: oracle.lay_out(tensor, layout)})
    if case.training and not tracked:
        case = dataclasses.replace(case, running_mean=None, running_var=None)
    return case


thorough = settings(
    max_examples=30,
    derandomize="CI" in os.environ,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@needs_kernels
@given(call=st.fixed_dictionaries(CALLS))
@thorough
@pytest.mark.usefixtures("instruction_set", "poisoned", "only_kernels")
def test_the_kernels(call):
    check(drawn_case(**call))


@given(call=st.fixed_dictionaries(CALLS).filter(lambda call: call["dtype"] != torch.float64))
@thorough
def test_the_reference(monkeypatch, call):
    monkeypatch.setattr(dispatch, "BACKENDS", ())
    case = drawn_case(**call)
    oracle.assert_as_accurate(oracle.run(case, batch_norm), case)
