"""Moments against float64 NumPy, over any split of the data."""

from __future__ import annotations

import functools
import operator

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st

from bnkit.moments import Moments

DIMS = (0, 2)
# (mean, standard deviation): the usual; far from zero, where E[x²] - E[x]² would return noise; tiny; huge.
SCALES = [(0.0, 1.0), (1e4, 1e-2), (-3e3, 1e-3), (1e-20, 1e-15), (1e12, 1e10)]


def draw(seed: int, shape: tuple[int, ...], mean: float, std: float, dtype: torch.dtype) -> torch.Tensor:
    values = mean + std * np.random.default_rng(seed).standard_normal(shape)
    return torch.from_numpy(values).to(dtype)


def assert_moments_of(moments: Moments, values: torch.Tensor, *, rel: float) -> None:
    """`moments` are those of `values`, (n, channels); `rel` bounds the error relative to mean, deviation and m2."""
    x = values.double().numpy()
    mean, m2 = x.mean(0), ((x - x.mean(0)) ** 2).sum(0)
    exact_mean = moments.mean.double().numpy() + np.asarray(moments.mean_error, dtype=np.float64)
    # The rounding of the data themselves: n values equal in float32 have a mean off by their last bit at most.
    floor = rel * np.sqrt(m2 / len(x)) + np.finfo(np.float64).eps * np.abs(mean) * 4
    last_bit = torch.finfo(moments.mean.dtype).eps * np.abs(mean)
    assert int(moments.count) == len(x)
    np.testing.assert_array_less(np.abs(exact_mean - mean), floor + rel * last_bit + 1e-300)
    np.testing.assert_array_less(np.abs(moments.mean.double().numpy() - mean), floor + 0.51 * last_bit + 1e-300)
    np.testing.assert_array_less(np.abs(moments.m2.double().numpy() - m2), rel * (m2 + len(x) * last_bit**2) + 1e-300)


@pytest.mark.parametrize(("mean", "std"), SCALES)
@pytest.mark.parametrize(("dtype", "rel"), [(torch.float32, 2e-6), (torch.float64, 1e-12)])
def test_of_equals_numpy(mean, std, dtype, rel):
    x = draw(0, (31, 5, 7), mean, std, dtype)
    assert_moments_of(Moments.of(x, DIMS), x.movedim(1, -1).flatten(0, 1), rel=rel)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_of_half_precision_accumulates_in_float32(dtype):
    x = draw(0, (300, 5, 7), 3.0, 1.0, dtype)
    moments = Moments.of(x, DIMS)
    assert moments.mean.dtype == moments.m2.dtype == torch.float32
    assert_moments_of(moments, x.movedim(1, -1).flatten(0, 1), rel=2e-6)


def test_of_float64_stays_float64():
    assert Moments.of(torch.zeros(2, 3, dtype=torch.float64), (0,)).m2.dtype == torch.float64


def test_of_equal_values_has_no_variance():
    moments = Moments.of(torch.full((1000, 3), 0.1), (0,))
    assert (moments.variance() <= 1e-18).all()
    assert (moments.variance() >= 0).all()


@pytest.mark.parametrize("scale", SCALES)
@given(
    cuts=st.lists(st.integers(0, 64), max_size=8).map(sorted),
    seed=st.integers(0, 2**16),
    order=st.randoms(use_true_random=False),
)
def test_merge_is_exact_under_any_split(scale, cuts, seed, order):
    x = draw(seed, (64, 3), *scale, torch.float32)
    parts = [Moments.of(part, (0,)) for part in np.split(x, cuts)]
    order.shuffle(parts)
    merged = functools.reduce(Moments.merge, parts, Moments.empty(3))
    assert_moments_of(merged, x, rel=1e-5)


@given(
    values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=2, max_size=40),
    at=st.integers(0, 40),
)
def test_merge_of_arbitrary_values(values, at):
    x = torch.tensor(values, dtype=torch.float32)[:, None]
    merged = Moments.of(x[:at], (0,)).merge(Moments.of(x[at:], (0,)))
    whole = x.double()
    m2 = (whole - whole.mean()).square().sum().item()
    # Squares below float32's range are lost, here as anywhere.
    assert merged.m2.item() == pytest.approx(m2, rel=1e-5, abs=1e-35)
    assert (merged.mean.double() + merged.mean_error).item() == pytest.approx(
        whole.mean().item(), rel=1e-7, abs=1e-7 * whole.abs().max().item() + 1e-40
    )


def test_many_small_batches_do_not_stagnate():
    """10,000 merges: in a mean of one float32, each later batch's share is below half a last bit and is lost."""
    x = draw(1, (10_000, 8, 1), 1e4, 1e-2, torch.float32)
    merged = functools.reduce(Moments.merge, (Moments.of(batch, (0,)) for batch in x))
    assert_moments_of(merged, x.flatten(0, 1), rel=1e-4)


def test_empty_is_neutral():
    some = Moments.of(draw(0, (9, 3), 1e4, 1e-2, torch.float32), (0,))
    for merged in (some.merge(Moments.empty(3)), Moments.empty(3).merge(some)):
        assert merged.count == 9
        assert torch.equal(merged.mean, some.mean)
        assert torch.equal(merged.mean_error, some.mean_error)
        assert torch.equal(merged.m2, some.m2)
    nothing = Moments.of(torch.zeros(0, 3, 4), DIMS).merge(Moments.empty(3))
    assert nothing.count == 0
    assert torch.equal(nothing.mean, torch.zeros(3))


def test_mean_error_may_be_left_out():
    moments = Moments(2, torch.tensor([1.0]), torch.tensor([2.0])).merge(Moments.of(torch.tensor([[4.0]]), (0,)))
    assert moments.mean.item() == pytest.approx(2.0)
    assert moments.m2.item() == pytest.approx(2.0 + 9 * 2 * 1 / 3)


def test_variance_divides_by_count_or_one_less():
    moments = Moments.of(torch.tensor([[1.0], [2.0], [6.0]]), (0,))
    assert moments.variance().item() == pytest.approx(14 / 3)
    assert moments.variance(unbiased=True).item() == pytest.approx(7.0)


@pytest.mark.parametrize("count", [0, 1])
def test_variance_is_nan_where_undefined(count):
    as_int = Moments(count, torch.zeros(2), torch.zeros(2))
    as_tensor = Moments(torch.tensor(float(count)), torch.zeros(2), torch.zeros(2))
    for moments in (as_int, as_tensor):
        assert moments.variance(unbiased=True).isnan().all()
        assert moments.variance().isnan().all().item() == (count == 0)


def test_of_is_twice_differentiable():
    x = torch.randn(6, 2, 3, dtype=torch.float64, requires_grad=True)
    outputs = operator.attrgetter("mean", "m2")
    assert torch.autograd.gradcheck(lambda x: outputs(Moments.of(x, DIMS)), x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda x: outputs(Moments.of(x, DIMS)), x)


# Values a rank: equal, unequal (one of them a single value), empty on either side, empty everywhere.
RANKS = [(10, 10), (37, 1), (0, 24), (24, 0), (0, 0)]


def _all_reduce_worker(rank: int, init_file: str, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{init_file}", rank=rank, world_size=2)
    results = []
    for dtype in (torch.float32, torch.float64):
        for sizes in RANKS:
            parts = draw(7, (sum(sizes), 3), 1e4, 1e-2, dtype).split(sizes)
            moments = Moments.of(parts[rank], (0,)).all_reduce()
            results.append((moments.count, moments.mean, moments.m2, moments.mean_error))
    alone = dist.new_group([0]), dist.new_group([1])
    moments = Moments.of(torch.full((5, 2, 3), float(rank)), (0,)).all_reduce(alone[rank])
    results.append((moments.count, moments.mean, moments.m2, moments.mean_error))
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="this build of PyTorch has no torch.distributed")
def test_all_reduce_over_gloo(tmp_path):
    mp.spawn(_all_reduce_worker, (str(tmp_path / "init"), str(tmp_path)), nprocs=2)
    *first, own_first = torch.load(tmp_path / "0.pt")
    *second, own_second = torch.load(tmp_path / "1.pt")
    cases = [(dtype, sizes) for dtype in (torch.float32, torch.float64) for sizes in RANKS]
    for (dtype, sizes), one, other in zip(cases, first, second, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True)), f"ranks disagree at {sizes}"
        moments = Moments(*one)
        assert moments.mean.dtype == moments.m2.dtype == dtype
        if sum(sizes):
            rel = 2e-6 if dtype == torch.float32 else 1e-10
            assert_moments_of(moments, draw(7, (sum(sizes), 3), 1e4, 1e-2, dtype), rel=rel)
        else:
            assert moments.count == 0
            assert torch.equal(moments.mean, torch.zeros(3, dtype=dtype))
    # A group of one reduces over itself; the channels may have a shape.
    assert torch.equal(own_first[1], torch.zeros(2, 3))
    assert torch.equal(own_second[1], torch.ones(2, 3))


@pytest.mark.parametrize(
    ("shape", "dims"), [((5,), (0,)), ((5, 3), (0,)), ((5, 3, 2), (0, 2)), ((5, 3, 2, 4), (0, 2, 3))]
)
def test_all_dimensions_but_the_channels_by_default(shape, dims):
    x = torch.randn(shape)
    found, expected = Moments.of(x), Moments.of(x, dims)
    assert found.count == expected.count
    assert torch.equal(found.mean, expected.mean)
    assert torch.equal(found.m2, expected.m2)
    assert found.mean.shape == shape[1:2]
