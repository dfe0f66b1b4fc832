"""The C kernels on tensors that lie otherwise in memory: views, offsets, expanded and overlapping ones.

Every view is cut from memory full of NaN, so a kernel that reads beside it shows.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import oracle
import pytest
import torch
from _cases import assert_identical, batch_norm, check, instruction_set, needs_kernels, only_kernels, poisoned  # noqa: F401
from oracle import make_case
from torch import Tensor

from bnkit.ops import cpu

pytestmark = [needs_kernels, pytest.mark.usefixtures("poisoned", "only_kernels")]


def nan(*shape: int, like: Tensor) -> Tensor:
    return torch.full(shape, math.nan, dtype=like.dtype)


def offset(x: Tensor) -> Tensor:
    """Contiguous, from the fourth element of its memory on: aligned to nothing but an element."""
    memory = nan(x.numel() + 5, like=x)
    memory[3:-2] = x.flatten()
    return memory[3:-2].view(x.shape)


def channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def channels_last_offset(x: Tensor) -> Tensor:
    return offset(x.movedim(1, -1)).movedim(-1, 1)


def every_second_image(x: Tensor) -> Tensor:
    memory = nan(2 * x.shape[0], *x.shape[1:], like=x)
    memory[1::2] = x
    return memory[1::2]


def some_channels(x: Tensor) -> Tensor:
    """A chunk along the channels, as a concatenating network cuts them."""
    memory = nan(x.shape[0], x.shape[1] + 3, *x.shape[2:], like=x)
    memory[:, 2:-1] = x
    return memory[:, 2:-1]


def some_channels_of_channels_last(x: Tensor) -> Tensor:
    memory = channels_last(nan(x.shape[0], x.shape[1] + 3, *x.shape[2:], like=x))
    memory[:, 2:-1] = x
    return memory[:, 2:-1]


def cropped(x: Tensor) -> Tensor:
    memory = nan(*x.shape[:2], *(size + 2 for size in x.shape[2:]), like=x)
    inside = (slice(None), slice(None), *[slice(1, -1)] * (x.dim() - 2))
    memory[inside] = x
    return memory[inside]


def every_third_column(x: Tensor) -> Tensor:
    memory = nan(*x.shape[:-1], 3 * x.shape[-1], like=x)
    memory[..., 1::3] = x
    return memory[..., 1::3]


def reversed_axes(x: Tensor) -> Tensor:
    return x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim())))


def batch_innermost(x: Tensor) -> Tensor:
    return x.movedim(0, -1).contiguous().movedim(-1, 0)


LAYOUTS = [
    offset,
    channels_last,
    channels_last_offset,
    every_second_image,
    some_channels,
    some_channels_of_channels_last,
    cropped,
    every_third_column,
    reversed_axes,
    batch_innermost,
]
SHAPES = {
    (6, 10): "rows",
    (5, 3, 37): "sequences",
    (4, 6, 5, 7): "images",
    (3, 18, 3, 3): "small planes, which lie as rows",
    (2, 5, 3, 4, 6): "volumes",
}


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_tensor_lies_otherwise(shape, layout):
    for field, dtype in itertools.product(("x", "dy", "residual"), (torch.float32, torch.bfloat16)):
        case = make_case(shape, dtype=dtype, activation="relu", residual=True)
        there = layout(getattr(case, field))
        assert torch.equal(there, getattr(case, field)), "the layout has changed the values"
        check(dataclasses.replace(case, **{field: there}), f"{field} {dtype}")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.usefixtures("instruction_set")
def test_all_tensors_lie_otherwise(layout, training):
    for shape, activation in itertools.product(SHAPES, ("relu", None)):
        case = make_case(shape, activation=activation, residual=True, training=training)
        moved = {field: layout(getattr(case, field)) for field in ("x", "dy", "residual")}
        check(dataclasses.replace(case, **moved), f"{shape} {activation}")


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_the_neighbours_in_memory_stay(layout):
    case = make_case((4, 6, 5, 7), activation="relu", residual=True)
    moved = {field: layout(getattr(case, field)) for field in ("x", "dy", "residual")}
    memory = {field: torch.empty(0).set_(t.untyped_storage()).clone() for field, t in moved.items()}
    oracle.run(dataclasses.replace(case, **moved), batch_norm)
    for field, before in memory.items():
        after = torch.empty(0).set_(moved[field].untyped_storage())
        torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True, msg=f"the memory of {field} changed")


@pytest.mark.parametrize("layout", [offset, every_second_image, some_channels, cropped, every_third_column])
def test_what_is_copied_gives_the_bits_of_the_copy(layout):
    case = make_case((4, 6, 5, 7), activation="relu", residual=True)
    moved = {field: layout(getattr(case, field)) for field in ("x", "dy", "residual")}
    there = oracle.run(dataclasses.replace(case, **moved), batch_norm)
    assert_identical(there, oracle.run(case, batch_norm), layout.__name__)


TRANSPOSED = {
    (2, 64, 8, 16): "whole squares",
    (3, 37, 5, 9): "squares that are cut at both edges",
    (1, 1, 70, 2): "one channel",
    (2, 130, 1, 3): "planes narrower than a square",
    (5, 3, 4, 7, 6): "volumes",
    (2, 65, 40): "sequences",
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", TRANSPOSED, ids=str)
@pytest.mark.usefixtures("instruction_set")
def test_copies_to_the_other_layout(shape, dtype):
    x = torch.randn(shape).to(dtype)
    for start, end in ((offset(x), channels_last(x)), (channels_last_offset(x), x)):
        copied = cpu._like(start, end)
        assert torch.equal(copied, x)
        assert copied.is_contiguous() if end.is_contiguous() else copied.movedim(1, -1).is_contiguous()


@pytest.mark.parametrize(
    "shape", [(1, 6, 5, 7), (4, 6, 1, 7), (4, 6, 7, 1), (1, 6, 1, 7), (4, 1, 5, 7), (4, 6, 1, 1)], ids=str
)
def test_strides_of_dimensions_of_size_1_tell_nothing(shape):
    """A slice of one image keeps the stride of the whole, and so on: such tensors are contiguous all the same."""
    strides, last = (
        [999 if size == 1 else stride for size, stride in zip(shape, tensor.stride(), strict=True)]
        for tensor in (torch.empty(shape), channels_last(torch.empty(shape)))
    )
    for of_x, of_others in itertools.product((None, strides, last), repeat=2):
        case = make_case(shape, activation="relu", residual=True)
        moved = {}
        for field in ("x", "dy", "residual"):
            tensor, wanted = getattr(case, field), of_x if field == "x" else of_others
            there = tensor if wanted is None else torch.empty_strided(shape, wanted).copy_(tensor)
            moved[field] = there
        check(dataclasses.replace(case, **moved), f"{of_x} {of_others}")


def direct(case: oracle.Case, **moved: Tensor) -> dict[str, Tensor | None]:
    """What the backend returns. Autograd would lay a leaf's gradient out like the leaf."""
    case = dataclasses.replace(case, **moved)
    statistics = (case.running_mean, case.running_var, case.weight, case.bias)
    y, mean, invstd, kept = cpu.forward(
        case.x, *statistics, case.training, case.momentum, case.eps, case.activation, case.residual, True
    )
    saved = (case.x, mean, invstd, case.weight, case.bias, case.training, case.activation, kept)
    dx, dresidual, _, _ = cpu.backward(case.dy, *saved, (True,) * 4)
    return {"y": y, "dx": dx, "dresidual": dresidual}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_results_are_dense_and_in_the_layout_of_x(shape, layout):
    x = layout((case := make_case(shape, activation="relu", residual=True)).x)
    is_last = x.movedim(1, -1).is_contiguous() or layout is some_channels_of_channels_last
    for name, result in direct(case, x=x).items():
        assert result is not None
        rows = result.movedim(1, -1) if is_last else result
        assert rows.is_contiguous(), f"{name} has strides {result.stride()}, x has {x.stride()}"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_expanded_gradients(shape):
    """Of stride zero, as `mean()`, a broadcast sum or one image's gradient for all send them."""
    spatial = [1] * (len(shape) - 2)
    for dy in (torch.randn(()), torch.randn(shape[0], shape[1], *spatial), torch.randn(1, *shape[1:])):
        for activation, training in itertools.product(("relu", None), (True, False)):
            case = make_case(shape, activation=activation, residual=True, training=training)
            check(dataclasses.replace(case, dy=dy.expand(shape)), f"dy {tuple(dy.shape)} {activation} {training}")


def test_expanded_inputs():
    """One image for all of the batch, and one row for all of an image; as input and as residual."""
    for small in ((1, 4, 5, 6), (7, 4, 1, 6), (7, 4, 5, 1)):
        x, residual = torch.randn(small).expand(7, 4, 5, 6), torch.randn(small).expand(7, 4, 5, 6)
        case = make_case((7, 4, 5, 6), activation="relu", residual=True)
        check(dataclasses.replace(case, x=x, residual=residual), str(small))


@pytest.mark.parametrize("strides", [(1, 7, 3, 2), (30, 1, 6, 3), (2, 0, 5, 1)], ids=str)
def test_overlapping_memory(strides):
    """Windows that share their values, as `unfold` and `as_strided` give them."""
    x = torch.randn(500).as_strided((4, 5, 6, 3), strides, 1)
    case = dataclasses.replace(make_case((4, 5, 6, 3), activation="relu"), x=x)
    true, ours = oracle.exact(case), oracle.run(case, batch_norm)
    for name in ("y", "dx", "dweight", "dbias", "running_mean", "running_var"):
        torch.testing.assert_close(
            ours[name], true[name].float(), rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n} {m}"
        )


def test_parameters_that_are_views():
    """Every second number, an offset, one number for all; running statistics are updated where they lie."""
    case = make_case((6, 5, 4, 3), activation="relu")
    wide = torch.full((11,), math.nan)
    wide[1::2] = case.running_var
    shared = torch.tensor(1.5).expand(5)
    moved = dataclasses.replace(case, running_var=wide[1::2], weight=shared, bias=offset(case.bias))
    check(moved)
    cpu.forward(case.x, case.running_mean, moved.running_var, shared, None, True, 0.1, 1e-5, None, None, False)
    expected = oracle.exact(dataclasses.replace(case, weight=shared, bias=None))["running_var"]
    torch.testing.assert_close(wide[1::2].double(), expected, rtol=1e-6, atol=0)
    assert wide[::2].isnan().all(), "a neighbour of a running statistic was written to"
