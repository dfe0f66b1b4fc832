"""The C kernels by value, beside PyTorch's eager operators, with every instruction set that the machine has."""

from __future__ import annotations

import itertools

import oracle
import pytest
import torch
from _cases import batch_norm, check, instruction_set, needs_kernels, only_kernels, poisoned  # noqa: F401
from oracle import make_case

from bnkit.ops import cpu

pytestmark = [needs_kernels, pytest.mark.usefixtures("poisoned", "only_kernels")]

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = {
    (60, 100): "rows, a tail in each",
    (2, 1): "one channel, two values: the least that training takes",
    (7, 3): "narrow rows, folded to wide ones, with some left over",
    (700, 3): "the same, in many folded rows",
    (3, 513): "rows wider than a sweep's vectors by one",
    (2000, 40): "several blocks of rows",
    (5, 3, 2, 2): "planes smaller than a vector, taken as rows",
    (4, 17, 1, 1): "planes of one value",
    (16, 20, 7, 7): "small planes in groups, with tails; an incomplete group at the end",
    (8, 3, 9, 11): "fewer channels than a group",
    (2, 1, 190, 190): "one channel, a run of all values, cut into several units",
    (1, 3, 150, 150): "planes cut into units of unequal length",
    (40, 2, 32, 33): "several blocks of planes",
    (2, 5, 3, 4, 6): "volumes",
    (3, 6, 40): "sequences",
}


def layouts(shape: tuple[int, ...]) -> list[str]:
    return ["contiguous", "channels_last"] if len(shape) in (4, 5) else ["contiguous"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("instruction_set")
def test_shapes(shape, dtype):
    for layout, training, residual in itertools.product(layouts(shape), (True, False), (True, False)):
        options = {"dtype": dtype, "layout": layout, "training": training, "residual": residual}
        check(make_case(shape, activation="relu", **options), str(options))


@pytest.mark.parametrize("activation", oracle.ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("instruction_set")
def test_activations(dtype, activation):
    affines = ("both", "weight", "none")
    for shape, training, residual in itertools.product(((6, 3, 5, 9), (9, 21)), (True, False), (True, False)):
        for layout, affine in itertools.product(layouts(shape), affines):
            options = {"layout": layout, "training": training, "residual": residual, "affine": affine}
            check(make_case(shape, dtype=dtype, activation=activation, **options), f"{shape} {options}")


STREAMED = {
    (300, 2, 96, 97): "runs that start at any address",
    (9, 64, 92, 92): "aligned runs",
    (20_000, 256): "aligned rows",
    (140_001, 31): "rows of which three go as one, none aligned",
    (140_001, 32): "rows of which two go as one, no wider than a tile of AVX-512",
    (9_100, 513): "rows of which none but the first is aligned",
}


HUGE = {(300_001, 1): "one run", (100_003, 3): "folded rows, one left over", (70_001, 5, 1, 1): "planes of one value"}


@pytest.mark.parametrize("shape", HUGE, ids=str)
@pytest.mark.usefixtures("instruction_set")
def test_very_many_values_a_channel(shape):
    check(make_case(shape, activation="relu", residual=True))
    check(make_case(shape, mean=1e4, std=1e-2))


@pytest.mark.parametrize("shape", STREAMED, ids=str)
@pytest.mark.usefixtures("instruction_set")
def test_outputs_too_large_for_the_caches(shape):
    check(make_case(shape, activation="relu", residual=True))


def test_bfloat16_too_large_for_the_caches():
    check(make_case((9, 64, 92, 181), dtype=torch.bfloat16, activation="relu", residual=True))


@pytest.mark.parametrize("shape", [(600, 3, 14, 14), (3, 2, 300, 300), (5000, 24)], ids=str)
@pytest.mark.usefixtures("instruction_set")
def test_mean_far_above_the_deviation(shape):
    """Eager PyTorch loses all but a digit here; the kernels must not."""
    case = make_case(shape, mean=1e4, std=1e-2, activation="relu")
    true, ours = oracle.exact(case), check(case)
    for name in ("y", "dweight", "dbias", "running_var"):
        error = (ours[name].double() - true[name]).abs().max() / true[name].abs().max()
        assert error < 2e-5, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("shape", [(90, 3, 12, 11), (20_000, 5)], ids=str)
@pytest.mark.usefixtures("instruction_set")
def test_images_of_different_means(shape):
    """Every image has a level of its own, the first is blank: no one shift suits all."""
    case = make_case(shape, mean=0.0, std=1e-2)
    case.x += torch.randn(shape[0], *[1] * (len(shape) - 1)) * 1e3
    case.x[0] = 0.0
    check(case)


@pytest.mark.parametrize("shape", [(64, 3, 30, 31), (60_000, 3)], ids=str)
@pytest.mark.usefixtures("instruction_set")
def test_first_values_unlike_all_others(shape):
    """The first shift is taken from values that have nothing to do with the rest."""
    case = make_case(shape, mean=0.0, std=1.0)
    case.x[: shape[0] // 50] = 3e4
    check(case)


@pytest.mark.parametrize("shape", [(64, 3, 30, 31), (60_000, 3), (9_000, 70)], ids=str)
@pytest.mark.parametrize("where", [0.01, 0.1, 0.5, 0.99])
@pytest.mark.usefixtures("instruction_set")
def test_values_that_leave_the_mean_so_far(shape, where):
    """From somewhere on all values lie far from the shift that the ones before have given."""
    case = make_case(shape, mean=0.0, std=1.0)
    case.x[int(where * shape[0]) :] += 3e4
    check(case)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_constant_channels(layout):
    """Values without deviation: the rounding of their mean must not show as one."""
    case = make_case((50, 3, 7, 5), layout=layout)
    case.x[:] = 1e4 / 3
    results = check(case)
    torch.testing.assert_close(results["y"], case.bias.view(1, 3, 1, 1).expand_as(case.x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("activation", oracle.ACTIVATIONS)
@pytest.mark.usefixtures("instruction_set")
def test_nan_stays_in_its_channel(layout, activation):
    case = make_case((6, 5, 4, 9), layout=layout, activation=activation)
    case.x[3, 2, 1, 7] = torch.nan
    results = oracle.run(case, batch_norm)
    nan = {name: results[name].isnan() for name in ("y", "dx", "dweight", "running_mean", "running_var")}
    for name, where in nan.items():
        by_channel = where.movedim(1, 0).flatten(1) if where.dim() > 1 else where.view(5, 1)
        assert by_channel[2].all(), f"{name} hides a NaN"
        assert not by_channel[[0, 1, 3, 4]].any(), f"{name} spreads a NaN"


@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=4)), ids=str)
def test_gradients_that_are_needed(needs):
    for training, activation in itertools.product((True, False), ("relu", "gelu", None)):
        for layout in ("contiguous", "channels_last"):
            case = make_case((6, 5, 4, 9), layout=layout, residual=True, training=training, activation=activation)
            _, mean, invstd, kept = cpu.forward(*vars_of(case))
            arguments = (case.dy, case.x, mean, invstd, case.weight, case.bias, training, activation, kept)
            every = cpu.backward(*arguments, (True,) * 4)
            some = cpu.backward(*arguments, needs)
            for gradient, expected, needed in zip(some, every, needs, strict=True):
                assert (gradient is not None) == needed
                if gradient is not None:
                    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)


def vars_of(case: oracle.Case) -> tuple:
    """The arguments of a backend's `forward`."""
    statistics = (case.running_mean.clone(), case.running_var.clone())
    options = (case.training, case.momentum, case.eps, case.activation, case.residual)
    return (case.x, *statistics, case.weight, case.bias, *options, True)


@pytest.mark.parametrize("training", [True, False])
def test_statistics_are_returned_in_double_precision(training):
    case = make_case((60, 7), training=training, mean=1e4)
    _, mean, invstd, _ = cpu.forward(*vars_of(case))
    true_mean, var = case.x.double().mean(0), case.x.double().var(0, correction=0)
    if not training:
        true_mean, var = case.running_mean.double(), case.running_var.double()
    torch.testing.assert_close(mean, true_mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(invstd, (var + case.eps).rsqrt(), rtol=1e-6, atol=0)


def test_without_running_statistics():
    case = make_case((60, 7))
    case.running_mean = case.running_var = None
    check(case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_parameters_of_half_precision(dtype, training):
    check(make_case((5, 3, 7), dtype=dtype, parameter_dtype=dtype, training=training))


def test_another_default_device():
    case = make_case((6, 5, 4), activation="relu")

    def results() -> list[torch.Tensor]:
        y, mean, invstd, _ = cpu.forward(*vars_of(case))
        arguments = (case.dy, case.x, mean, invstd, case.weight, case.bias, True, "relu", None)
        gradients = cpu.backward(*arguments, (True, False, True, True))
        return [tensor for tensor in (y, mean, invstd, *gradients) if tensor is not None]

    expected = results()
    with torch.device("meta"):
        found = results()
    assert len(found) == 6
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
