"""What is kept for the backward pass: how much, and that hooks may give it back in another form."""

from __future__ import annotations

import oracle
import pytest
import torch
from _cases import batch_norm, needs_kernels
from oracle import Case, make_case
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from bnkit import functional

ACTIVATIONS = [*oracle.ACTIVATIONS, "elu"]
KEPT_UNFUSED = {"elu"}  # its operation of its own keeps what it is given


def leaf(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().requires_grad_()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@needs_kernels
def test_bytes_kept(activation, residual, layout):
    """Beside x and the residual, which are there anyway, two numbers a channel, or in the residual's place bits."""
    case = make_case((8, 16, 12, 12), layout=layout, residual=residual, activation=activation)
    case.x, case.residual = leaf(case.x), leaf(case.residual)
    saved: dict[int, Tensor] = {}
    with saved_tensors_hooks(lambda t: saved.update({t.data_ptr(): t}) or t, lambda t: t):
        batch_norm(case)
    given = {t.data_ptr() for t in (case.x, case.residual, case.weight, case.bias) if t is not None}
    found = sum(t.nbytes for pointer, t in saved.items() if pointer not in given)
    bits = case.x.numel() // 8 + 2 if residual and activation == "relu" else 0
    assert found == 2 * 8 * 16 + bits + (case.x.nbytes if activation in KEPT_UNFUSED else 0)
    keeps_residual = residual and activation not in (None, "relu", *KEPT_UNFUSED)
    assert (case.residual is not None and case.residual.data_ptr() in saved) == keeps_residual


def widened(low: torch.dtype):
    """Hooks that save floating-point numbers in `low`, and give back float32."""
    return saved_tensors_hooks(
        lambda t: t.to(low) if t.is_floating_point() else t, lambda t: t.float() if t.is_floating_point() else t
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("residual", [False, True])
@needs_kernels
def test_hooks_that_save_in_another_type(dtype, activation, residual):
    """Each pass reads numbers of one type: a tensor of another would be read past its end."""
    for shape, layout in (((40, 24, 5, 5), "channels_last"), ((16, 9, 9, 9), "contiguous"), ((300, 7), "contiguous")):
        case = make_case(shape, dtype=dtype, layout=layout, activation=activation, residual=residual, std=1.0, mean=0.0)
        wanted = oracle.run(case, batch_norm)
        with widened(torch.float32):
            assert_near(oracle.run(case, batch_norm), wanted, 1e-2 if dtype.itemsize == 2 else 1e-4)
        with widened(torch.bfloat16):
            assert_near(oracle.run(case, batch_norm), wanted, 0.2)


def assert_near(found: oracle.Results, wanted: oracle.Results, tolerance: float) -> None:
    """By the mean of the errors, since ReLU's slope may turn over where z is nearly 0."""
    for name, expected in wanted.items():
        ours = found[name]
        assert (ours is None) == (expected is None)
        if ours is not None and expected is not None:
            assert ours.dtype == expected.dtype
            error = (ours.double() - expected.double()).abs().mean() / expected.double().abs().mean()
            assert error < tolerance, f"{name}: {error:.1e}"


@pytest.mark.usefixtures("backend")
def test_hooks_that_save_in_another_type_in_place():
    x, weight, bias = torch.randn(16, 9, 5, 5), torch.rand(9) + 0.5, torch.rand(9)

    def gradients() -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        y = functional.batch_norm(
            leaves[0], None, None, *leaves[1:], training=True, activation="leaky_relu", inplace=True
        )
        return list(torch.autograd.grad(y, leaves, x.sin()))

    wanted = gradients()
    with widened(torch.float32):
        for ours, expected in zip(gradients(), wanted, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("watched", ["neither", "forward", "backward", "both"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.usefixtures("backend")
def test_checkpointing_of_which_one_pass_is_watched(activation, layout, watched):
    """A dispatch mode sees operators, and what is kept may not depend on whether there is one."""
    case = make_case((4, 8, 5, 7), layout=layout, residual=True, activation=activation)

    def through_checkpoint(case: Case) -> Tensor:
        def function(x: Tensor, residual: Tensor) -> Tensor:
            options = {"training": True, "activation": activation, "residual": residual}
            return functional.batch_norm(x, None, None, case.weight, case.bias, **options)

        return checkpoint(function, case.x, case.residual, use_reentrant=False)

    def gradients(watched: str) -> tuple[Tensor, ...]:
        x, residual = leaf(case.x), leaf(case.residual)
        again = make_case((4, 8, 5, 7))
        again.x, again.residual, again.weight, again.bias = x, residual, case.weight, case.bias
        y = watch(lambda: through_checkpoint(again), watched in ("forward", "both"))
        return watch(lambda: torch.autograd.grad(y, (x, residual), case.dy), watched in ("backward", "both"))

    for ours, expected in zip(gradients(watched), gradients("neither"), strict=True):
        torch.testing.assert_close(ours, expected)


def watch(function, watched: bool):
    if not watched:
        return function()
    with FlopCounterMode(display=False):
        return function()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@needs_kernels
def test_hooks_that_save_masks_too_in_another_type(layout):
    """As numbers of half the bits a mask's bytes keep their values."""
    case = make_case((8, 16, 12, 12), layout=layout, residual=True, activation="relu")
    inputs = [leaf(case.x), leaf(case.residual)]
    case.x, case.residual = inputs
    upstream = torch.randn_like(case.x)
    expected = torch.autograd.grad(batch_norm(case), inputs, upstream)
    for low in (torch.float16, torch.bfloat16):
        with saved_tensors_hooks(lambda t: t.to(low), lambda t: t.float()):  # noqa: B023 (called in this turn)
            found = torch.autograd.grad(batch_norm(case), inputs, upstream)
        assert torch.equal(found[1], expected[1]) or (found[1] != expected[1]).float().mean() < 0.01
        torch.testing.assert_close(found[0], expected[0], atol=0.05, rtol=0.05)


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_hooks_that_are_methods_of_tensors(activation):
    case = make_case((8, 16, 12, 12), residual=True, activation=activation)
    case.x = leaf(case.x)
    expected = torch.autograd.grad(batch_norm(case).square().sum(), case.x)
    with saved_tensors_hooks(torch.Tensor.cpu, torch.Tensor.cpu):
        y = batch_norm(case)
    assert torch.equal(torch.autograd.grad(y.square().sum(), case.x)[0], expected[0])
