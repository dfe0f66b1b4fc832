"""ReLU's mask, which the C kernels keep instead of the residual: a bit for each value."""

from __future__ import annotations

import dataclasses

import oracle
import pytest
import torch
from _cases import batch_norm, instruction_set, needs_kernels, poisoned, threads_kept  # noqa: F401
from oracle import make_case
from torch import Tensor

from bnkit import functional
from bnkit.ops import cpu, reference

pytestmark = needs_kernels

# Each with the reason it is there.
MASKED = {
    ((6, 5, 4, 4), "contiguous"): "the shortest planes, of whole bytes",
    ((16, 20, 7, 7), "contiguous"): "planes whose last byte is shared by no one",
    ((2, 1, 190, 190), "contiguous"): "one channel: one run of all values",
    ((3, 2, 150, 151), "contiguous"): "planes cut into units",
    ((2, 8, 3, 3), "contiguous"): "images taken as rows",
    ((5, 24), "contiguous"): "narrow rows, three to one",
    ((2, 200), "contiguous"): "wide rows",
    ((700, 8, 3, 5), "channels_last"): "many narrow rows, some left over",
    ((30, 520, 2, 3), "channels_last"): "rows wider than a tile, with a tail",
    ((2, 16, 3, 4, 5), "channels_last"): "volumes",
    ((20, 1004, 2, 1), "contiguous"): "images as rows, whole bytes only with all their values",
}
TOO_NARROW = [((7, 3), "contiguous"), ((4, 5, 6, 7), "channels_last"), ((3, 3, 3, 3), "contiguous")]
STREAMED = {
    (90, 1000, 7, 7): "planes that start at any address",
    (30, 760, 14, 14): "planes that start at a quarter of a vector",
    (9, 64, 92, 92): "aligned planes",
    (20_000, 256): "aligned rows",
    (140_001, 32): "narrow rows",
    (9_100, 520): "rows of which few are aligned",
}


def passes(
    case: oracle.Case, by_mask: bool, needs: tuple[bool, bool, bool, bool] = (True,) * 4
) -> tuple[Tensor | None, list[Tensor | None]]:
    """What is kept, and all results, with a mask or with the residual itself."""
    statistics = [None if t is None else t.clone() for t in (case.running_mean, case.running_var)]
    options = (case.training, case.momentum, case.eps, case.activation, case.residual, by_mask)
    y, mean, invstd, kept = cpu.forward(case.x, *statistics, case.weight, case.bias, *options)
    saved = (case.x, mean, invstd, case.weight, case.bias, case.training, case.activation, kept)
    return kept, [y, *cpu.backward(case.dy, *saved, needs)]


def assert_the_same(case: oracle.Case) -> None:
    mask, found = passes(case, by_mask=True)
    residual, expected = passes(case, by_mask=False)
    assert mask is not None
    assert mask.dtype == torch.uint8
    assert residual is case.residual
    assert all(torch.equal(a.nan_to_num(1e9), b.nan_to_num(1e9)) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(("shape", "layout"), MASKED, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.usefixtures("instruction_set", "poisoned")
def test_the_same_bits_as_with_the_residual(shape, layout, dtype):
    for training in (True, False):
        assert_the_same(
            make_case(shape, layout=layout, dtype=dtype, training=training, activation="relu", residual=True)
        )


@pytest.mark.parametrize("shape", STREAMED, ids=str)
@pytest.mark.usefixtures("instruction_set", "poisoned")
def test_outputs_too_large_for_the_caches(shape):
    """Vectors begin where memory can be streamed to, in the midst of the mask's bytes."""
    assert_the_same(make_case(shape, activation="relu", residual=True))


@pytest.mark.parametrize("shape", [(45, 1000, 7, 7), (140_001, 16), (2_600, 1000)], ids=str)
@pytest.mark.usefixtures("instruction_set", "poisoned")
def test_too_large_in_double_precision(shape):
    """Vectors of fewer lanes than a byte has bits, streamed."""
    assert_the_same(make_case(shape, dtype=torch.float64, activation="relu", residual=True))


@pytest.mark.parametrize(("shape", "layout"), MASKED, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.usefixtures("instruction_set", "poisoned")
def test_a_bit_is_set_where_y_is_positive(shape, layout, dtype):
    case = make_case(shape, layout=layout, dtype=dtype, activation="relu", residual=True)
    mask, (y, *_) = passes(case, by_mask=True)
    assert mask is not None
    assert y is not None
    in_memory = y if layout == "contiguous" else y.movedim(1, -1)
    plane = y[0, 0].numel() if layout == "contiguous" else 1
    run = plane if plane >= 16 and shape[1] > 1 else y.numel()  # rows are whole bytes, so all of them are one run
    runs = (in_memory > 0).reshape(-1, run)
    padded = torch.nn.functional.pad(runs, (0, -run % 8)).view(len(runs), -1, 8)
    packed = (padded * 2 ** torch.arange(8)).sum(2).flatten()
    assert torch.equal(mask.flatten()[: len(packed)].long(), packed)


@pytest.mark.usefixtures("instruction_set", "poisoned")
@pytest.mark.parametrize(("shape", "layout"), MASKED, ids=str)
def test_what_is_not_a_number_passes(shape, layout):
    case = make_case(shape, layout=layout, training=False, activation="relu", residual=True)
    assert case.residual is not None
    case.residual.masked_fill_(torch.rand(shape) < 0.1, torch.nan)
    assert_the_same(case)
    _, (y, _, dresidual, *_) = passes(case, by_mask=True)
    assert y is not None
    assert dresidual is not None
    assert torch.equal(dresidual, case.dy.masked_fill(y <= 0, 0))


@pytest.mark.parametrize("threads", [1, 2, 3, 5, 8])
@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((8, 3, 190, 191), "contiguous"),
        ((2, 1000, 12, 12), "channels_last"),
        ((40, 3000), "contiguous"),
        ((20, 1004, 2, 1), "contiguous"),  # threads share the channels, which are no multiple of 8
        ((20, 2012, 2, 1), "contiguous"),
    ],
)
@pytest.mark.usefixtures("poisoned", "threads_kept")
def test_no_two_threads_share_a_byte(shape, layout, threads):
    case = make_case(shape, layout=layout, activation="relu", residual=True)
    _, expected = passes(case, by_mask=False)
    torch.set_num_threads(threads)
    for _ in range(5):
        _, found = passes(case, by_mask=True)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(("shape", "layout"), TOO_NARROW, ids=str)
def test_rows_that_would_share_bytes_keep_the_residual(shape, layout):
    case = make_case(shape, layout=layout, activation="relu", residual=True)
    assert passes(case, by_mask=True)[0] is case.residual


@pytest.mark.parametrize("activation", [None, *oracle.ACTIVATIONS])
def test_only_relu_with_a_residual_has_a_mask(activation):
    case = make_case((4, 3, 5, 7), activation=activation, residual=True)
    kept, _ = passes(case, by_mask=True)
    if activation == "relu":
        assert kept is not None
        assert kept.dtype == torch.uint8
    else:
        assert kept is (None if activation is None else case.residual)
    assert passes(dataclasses.replace(case, residual=None), by_mask=True)[0] is None


def test_what_is_saved_is_a_bit_for_each_value_of_the_residual():
    case, saved = make_case((8, 6, 32, 32), activation="relu", residual=True), []
    case.x.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        batch_norm(case)
    rest = sum(t.nbytes for t in saved if t.data_ptr() != case.x.data_ptr())
    assert rest < case.x.numel() / 8 + 4 * 8 * 6 + 100


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "transposed"])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_hooks_that_save_in_another_order(layout, order):
    """As `save_on_cpu` does, whose copies are contiguous."""
    case = make_case((4, 8, 5, 7), layout=layout, activation="relu", residual=True)
    wanted = oracle.run(case, batch_norm)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: t.contiguous(memory_format=order) if t.dim() == 4 else t.clone(), lambda t: t
    ):
        assert_near(oracle.run(case, batch_norm), wanted)
    with torch.autograd.graph.save_on_cpu():
        assert_near(oracle.run(case, batch_norm), wanted)


def assert_near(results: oracle.Results, wanted: oracle.Results) -> None:
    for name, expected in wanted.items():
        torch.testing.assert_close(results[name], expected, rtol=1e-5, atol=1e-5)


def test_no_mask_without_gradients(monkeypatch):
    made, empty = [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: made.append(k.get("dtype")) or empty(*a, **k))
    case = make_case((4, 3, 5, 7), activation="relu", residual=True)
    batch_norm(case)
    assert torch.uint8 not in made
    batch_norm(dataclasses.replace(case, x=case.x.clone().requires_grad_()))
    assert torch.uint8 in made


def leaves_of(case: oracle.Case) -> list[Tensor]:
    tensors = (case.x, case.weight, case.bias, case.residual)
    return [t.detach().clone().requires_grad_() for t in tensors if t is not None]


def ours(case: oracle.Case):
    def function(x, weight, bias, residual):
        options = {"training": case.training, "activation": "relu", "residual": residual}
        return functional.batch_norm(x, case.running_mean, case.running_var, weight, bias, momentum=0.0, **options)

    return function


@pytest.mark.parametrize("training", [True, False])
def test_second_derivatives(training):
    case = make_case((3, 2, 4, 5), dtype=torch.float64, training=training, activation="relu", residual=True)
    leaves = leaves_of(case)
    assert torch.autograd.gradcheck(ours(case), leaves, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(ours(case), leaves, check_batched_grad=True)


@pytest.mark.parametrize("training", [True, False])
def test_second_derivatives_by_value(training):
    """Those of the reference."""
    case = make_case((3, 8, 4, 5), layout="channels_last", training=training, activation="relu", residual=True)

    def first_and_second(function) -> list[Tensor]:
        leaves = leaves_of(case)
        dy = case.dy.clone().requires_grad_()
        first = torch.autograd.grad(function(*leaves), leaves, dy, create_graph=True)
        penalty = sum(g.square().sum() for g in first)
        return [*first, *torch.autograd.grad(penalty, [*leaves, dy], allow_unused=True, materialize_grads=True)]

    def plain(x, weight, bias, residual):
        statistics = (case.running_mean.clone(), case.running_var.clone())
        return reference.batch_norm(x, *statistics, weight, bias, training, 0.0, 1e-5, "relu", residual)

    for a, b in zip(first_and_second(ours(case)), first_and_second(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


def test_an_infinite_cotangent_stays_out_where_nothing_passed():
    case = make_case((3, 8, 4, 5), training=False, activation="relu", residual=True)
    leaves, dy = leaves_of(case), torch.full_like(case.dy, torch.inf)
    y = ours(case)(*leaves)
    for create_graph in (False, True):
        dresidual = torch.autograd.grad(y, leaves[3], dy, retain_graph=True, create_graph=create_graph)[0]
        assert torch.equal(dresidual, torch.where(y > 0, torch.inf, 0.0))


@pytest.mark.parametrize("make", [lambda dy: torch._neg_view(-dy), lambda dy: torch._efficientzerotensor(dy.shape)])
@pytest.mark.parametrize("training", [True, False])
def test_a_cotangent_that_memory_does_not_hold(make, training):
    """A negated view, and forward mode's zeros, which have no memory: the reference serves, by what the mask tells."""
    case = make_case((3, 8, 4, 5), training=training, activation="relu", residual=True)
    leaves, dy = leaves_of(case), make(case.dy)
    y = ours(case)(*leaves)
    found = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    wanted = torch.autograd.grad(y, leaves, case.dy if dy.is_neg() else torch.zeros_like(case.dy))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("needs", [(True, False, True, True), (False, True, False, False)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_streamed_gradients_one_by_one(needs, dtype):
    shape = (30, 760, 14, 14) if dtype is torch.float32 else (60, 760, 14, 14)
    case = make_case(shape, dtype=dtype, activation="relu", residual=True)
    for some, every in zip(passes(case, True, needs)[1][1:], passes(case, False)[1][1:], strict=True):
        assert some is None or torch.equal(some, every)


def test_the_residual_may_change_after_the_forward_pass():
    """It is not kept, so a block that goes on in place on its shortcut is served."""
    case = make_case((4, 3, 5, 7), activation="relu", residual=True)
    expected = oracle.run(case, batch_norm)["dx"]
    x, residual = case.x.clone().requires_grad_(), case.residual
    assert residual is not None
    y = batch_norm(dataclasses.replace(case, x=x))
    residual.zero_()
    y.backward(case.dy)
    assert x.grad is not None
    assert torch.equal(x.grad, expected)
