"""The Triton kernels by value, beside PyTorch's eager operators: in Triton's interpreter on the CPU, and on a GPU.

Uninitialized memory is NaN throughout, so a value that no kernel wrote shows.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import types
from collections.abc import Iterator

import oracle
import pytest
import torch
from _interpreter import interpreted
from oracle import Case, make_case
from torch import Tensor

from bnkit import functional
from bnkit.ops import cuda, dispatch

pytest.importorskip("triton", reason="Triton is not installed")


@pytest.fixture(params=["interpreted", "compiled"], scope="module")
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "compiled":
        if not cuda.available():
            pytest.skip("no GPU that the kernels run on")
        yield "cuda"
    else:
        with interpreted():
            yield "cpu"


@pytest.fixture
def tiles(device: str) -> types.ModuleType:
    return importlib.import_module("bnkit.ops._triton_tiles")


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """In deterministic mode PyTorch fills new memory with NaN."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["slabs", "sweeps"])
def path(request: pytest.FixtureRequest, tiles: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each way through the kernels, whatever the size. The tiles of a sweep are small, so that there are several."""
    monkeypatch.setattr(tiles, "RESIDENT_VALUES", 2**30 if request.param == "slabs" else 0)
    monkeypatch.setattr(tiles, "TILE_VALUES", 128)
    return request.param


@pytest.fixture(autouse=True)
def _only_these_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """`supports` takes tensors of a GPU; the interpreter takes those of the CPU too."""
    kernels = types.SimpleNamespace(supports=lambda *_: True, forward=cuda.forward, backward=cuda.backward)
    monkeypatch.setattr(dispatch, "BACKENDS", (kernels,))


def batch_norm(case: Case) -> Tensor:
    arguments = (case.x, case.running_mean, case.running_var, case.weight, case.bias)
    options = {"activation": case.activation, "residual": case.residual}
    return functional.batch_norm(*arguments, case.training, case.momentum, case.eps, **options)


def run(case: Case, device: str) -> oracle.Results:
    """The kernels' results for a case, on the CPU."""
    fields = {f.name: getattr(case, f.name) for f in dataclasses.fields(case)}
    moved = Case(**{k: on(device, v) if isinstance(v, Tensor) else v for k, v in fields.items()})
    return {k: None if v is None else v.cpu() for k, v in oracle.run(moved, batch_norm).items()}


def on(device: str, tensor: Tensor) -> Tensor:
    """The tensor there, as it lies in memory: `Tensor.to` leaves out gaps, offsets and repetitions."""
    storage = torch.empty(0, dtype=tensor.dtype, device=device).set_(tensor.untyped_storage().to(device=device))
    return storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def check(case: Case, device: str, label: str = "") -> None:
    oracle.assert_as_accurate(run(case, device), case, label)


SHAPES = {
    (5, 3, 7, 5): "odd throughout",
    (2, 1, 3): "one channel, of few values",
    (4, 17, 1, 1): "planes of one value",
    (3, 5, 2, 2): "planes so small that several channels go together",
    (1, 3, 9, 60): "one image; planes cut into tiles of unequal size",
    (2, 3, 3, 2, 5): "volumes",
    (33, 3): "rows, fewer channels than a tile has",
    (3, 67): "rows, more channels than a tile has",
    (700, 2): "many rows: every program has several tiles",
}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("path")
def test_shapes(device, shape, layout):
    if layout == "channels_last" and len(shape) < 4:
        pytest.skip("there is no such layout of fewer than four dimensions")
    for training, residual in itertools.product((True, False), repeat=2):
        case = make_case(shape, layout=layout, training=training, activation="relu", residual=residual)
        check(case, device, f"training={training} residual={residual}")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "shape", [(32, 64, 56, 56), (8, 16, 75, 77), (16, 256, 14, 14), (32, 512, 7, 7), (32, 24, 8, 8)]
)
def test_blocks_of_full_size(device, shape, layout):
    """Several warps a program, and aligned runs that are read many bytes at a time."""
    if device == "cpu" and shape[-1] != 8:
        pytest.skip("takes the interpreter minutes")
    for dtype, residual in itertools.product((torch.float32, torch.bfloat16), (True, False)):
        case = make_case(shape, dtype=dtype, layout=layout, activation="relu", residual=residual)
        check(case, device, f"{dtype} residual={residual}")


@pytest.mark.parametrize("activation", oracle.ACTIVATIONS)
@pytest.mark.usefixtures("path")
def test_activations(device, activation):
    for residual, affine, training in itertools.product((True, False), ("both", "weight", "none"), (True, False)):
        case = make_case((3, 2, 5), activation=activation, residual=residual, affine=affine, training=training)
        check(case, device, f"residual={residual} affine={affine} training={training}")


@pytest.mark.parametrize("activation", ["silu", "gelu", "sigmoid", "tanh"])
def test_activations_of_small_and_of_large_values(device, activation):
    for scale in (1e-3, 30.0):
        case = make_case((40, 3), activation=activation, affine="weight", training=False)
        case.weight *= scale
        check(case, device, f"weights of about {scale}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.usefixtures("path")
def test_half_precision(device, dtype, layout):
    for training, activation in itertools.product((True, False), ("gelu", None)):
        case = make_case(
            (5, 3, 7, 5), dtype=dtype, layout=layout, training=training, activation=activation, residual=True
        )
        check(case, device, f"training={training} activation={activation}")


@pytest.mark.parametrize("activation", oracle.ACTIVATIONS)
@pytest.mark.usefixtures("path")
def test_activations_in_bfloat16(device, activation):
    check(make_case((3, 2, 5), dtype=torch.bfloat16, activation=activation, residual=True), device)


@pytest.mark.parametrize("shape", [(2, 513), (2, 513, 2, 2), (3000, 2, 1, 1)], ids=str)
@pytest.mark.usefixtures("path")
def test_many_channels_and_many_samples(device, shape):
    """One channel more than fills whole tiles; more samples than a program has."""
    check(make_case(shape, activation="relu", residual=True), device)


@pytest.mark.usefixtures("path")
def test_parameters_of_half_precision(device):
    for training in (True, False):
        check(make_case((5, 3, 7), dtype=torch.bfloat16, parameter_dtype=torch.bfloat16, training=training), device)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.usefixtures("path")
def test_a_mean_far_above_the_deviation(device, layout):
    case = make_case((6, 3, 9, 11), layout=layout, mean=1e4, std=1e-2)
    check(case, device)
    # Eager PyTorch rounds the mean by a good part of the deviation; the kernels do not.
    found, true = run(case, device), oracle.exact(case)
    for name in ("y", "dx", "dweight"):
        error, size = (found[name] - true[name]).abs().max(), true[name].abs().max()
        assert error <= 1e-5 * size, f"{name}: {error / size:.1e} of the largest value"


@pytest.mark.usefixtures("path")
def test_tiles_of_different_means(device):
    """Every image has a level of its own; the first is blank."""
    case = make_case((9, 2, 12, 11), mean=0.0, std=1e-2)
    case.x += torch.randn(9, 1, 1, 1) * 1e2
    case.x[0] = 0.0
    check(case, device)


@pytest.mark.usefixtures("path")
def test_constant_channels(device):
    """Values without deviation: the mean's rounding must not show as one."""
    case = make_case((5, 3, 7, 5))
    case.x[:] = 1e4 / 3
    check(case, device)


@pytest.mark.parametrize("layout", ["sliced", "transposed"])
@pytest.mark.usefixtures("path")
def test_other_strides(device, layout):
    check(make_case((4, 3, 5, 7), layout=layout, activation="silu", residual=True), device)


@pytest.mark.usefixtures("path")
def test_storage_offsets_and_gradients_of_another_layout(device):
    case = make_case((4, 3, 5, 7), activation="tanh", residual=True)
    case.x = torch.cat([torch.full((1, 3, 5, 7), torch.nan), case.x])[1:]
    case.residual = oracle.lay_out(case.residual, "channels_last")
    case.dy = case.dy[:1, :1, :1, :1].expand(case.x.shape)
    check(case, device)


@pytest.mark.usefixtures("path")
def test_running_statistics_may_be_absent(device):
    check(dataclasses.replace(make_case((4, 3, 5)), running_mean=None, running_var=None), device)


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.usefixtures("path")
def test_any_subset_of_the_gradients(device, activation):
    case = make_case((4, 3, 5, 7), activation=activation, residual=True)
    names = ("x", "residual", "weight", "bias")
    for training in (True, False):
        true = oracle.exact(dataclasses.replace(case, training=training))
        y, mean, invstd, shared = _forward(case, training, device)
        assert y.shape == case.x.shape
        for needs in itertools.product((True, False), repeat=4):
            found = cuda.backward(case.dy.to(device), shared[0], mean, invstd, *shared[1:3], training, activation,
                                  shared[3], needs)  # fmt: skip
            for name, needed, gradient in zip(names, needs, found, strict=True):
                assert (gradient is not None) == needed, name
                if gradient is not None:
                    torch.testing.assert_close(gradient.cpu(), true["d" + name].float(), rtol=1e-4, atol=1e-4)


def _forward(case: Case, training: bool, device: str) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    x, mean, var, weight, bias, residual = (
        getattr(case, name).to(device, copy=True)
        for name in ("x", "running_mean", "running_var", "weight", "bias", "residual")
    )
    y, mean, invstd, kept = cuda.forward(
        x, mean, var, weight, bias, training, 0.1, 1e-5, case.activation, residual, True
    )
    return y, mean, invstd, (x, weight, bias, kept)


@pytest.mark.usefixtures("path")
def test_statistics_are_returned_as_new_tensors(device):
    case = make_case((4, 3, 5, 7), residual=True, mean=1e3)
    for training in (True, False):
        _, mean, invstd, _ = _forward(case, training, device)
        dims, x = (0, 2, 3), case.x.double()
        wanted = (x.mean(dims), x.var(dims, correction=0)) if training else (case.running_mean, case.running_var)
        torch.testing.assert_close(mean.cpu(), wanted[0].double(), rtol=1e-12 if training else 0, atol=1e-6)
        torch.testing.assert_close(invstd.cpu().double(), (wanted[1].double() + 1e-5).rsqrt(), rtol=1e-6, atol=0)


@pytest.mark.usefixtures("path")
def test_what_is_not_finite_stays_in_its_channel(device):
    case = make_case((4, 3, 5), activation="relu")
    case.x[1, 1, 1] = torch.inf
    found = run(case, device)
    clean, others = run(make_case_like(case), device), [0, 2]
    assert found["y"][:, 1].isnan().all()
    for name in ("y", "dx"):
        assert torch.equal(found[name][:, others], clean[name][:, others])
    assert torch.equal(found["running_var"][others], clean["running_var"][others])


def make_case_like(case: Case) -> Case:
    return dataclasses.replace(case, x=case.x.detach().nan_to_num(posinf=0.0))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.usefixtures("path")
def test_results_are_the_same_to_the_bit(device, layout):
    case = make_case((6, 3, 9, 11), layout=layout, activation="gelu", residual=True)
    first, second = run(case, device), run(case, device)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.usefixtures("path")
def test_results_lie_in_memory_as_x_does(device, layout):
    case = make_case((4, 3, 5, 7), layout=layout, activation="relu", residual=True)
    found = run(case, device)
    assert all(found[name].stride() == case.x.stride() for name in ("y", "dx", "dresidual"))


def test_only_a_gpu_is_served():
    assert not cuda.supports(torch.ones(2, 3), (None,) * 4, None)
    assert not cuda.supports(torch.ones(2, 3, device="meta"), (None,) * 4, None)


def test_what_is_served_on_a_gpu():
    if not cuda.available():
        pytest.skip("no GPU that the kernels run on")
    x, c = torch.ones(2, 3, device="cuda"), torch.ones(3, device="cuda")
    assert cuda.supports(x, (c, c, None, None), x)
    assert cuda.supports(x.bfloat16(), (c, c, c, c), None)
    assert not cuda.supports(x.double(), (c, c, c, c), None)
    assert not cuda.supports(x, (c.cpu(), c, c, c), None)
    assert not cuda.supports(x, (c[:1].expand(3), c, c, c), None)
    assert not cuda.supports(x, (c, c, c, c), x.bfloat16())
    assert not cuda.supports(x, (c, c, c, c), x.cpu())


def test_a_mean_of_more_values_than_float32_counts(device):
    """2²⁴ + 1 values in two parts, with means large against the deviation."""
    forward = importlib.import_module("bnkit.ops._triton_forward")
    counts, means = (2.0**23 + 1, 2.0**23), (1e4, 1e4 + 1e-3)
    total = sum(counts)
    partials = torch.tensor([counts, means, (total * 1e-4, 0.0)], dtype=torch.float64).view(3, 2, 1).to(device)
    mean = torch.empty(1, dtype=torch.float64, device=device)
    invstd = torch.empty(1, device=device)
    merge = forward.merging(2, 1)
    as_compiled = float(torch.tensor(total, dtype=torch.float32))  # the interpreter would keep all digits
    numbers = (as_compiled, total / (total - 1), 0.1, 1e-5)
    forward._batch_norm_statistics_kernel[(1,)](partials, None, None, mean, invstd, 1, 2, *numbers, **merge)
    exact = (counts[0] * means[0] + counts[1] * means[1]) / total
    assert abs(mean.item() - exact) < 1e-9
    assert abs(invstd.item() - (1e-4 + 0.25e-6 + 1e-5) ** -0.5) < 1e-4
