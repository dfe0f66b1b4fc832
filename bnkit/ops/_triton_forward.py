"""The forward pass in Triton. Where a channel's slab fits in registers x is read once, else twice: see `_triton_tiles`.

`mean` is float64, since float32 would round it by a good part of a small deviation; a kernel takes it as two float32
numbers. Nothing of a tensor's size is float64. Sums are in a fixed order: results are the same from run to run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton_tiles import (
    OF_BATCH,
    Tiling,
    activate,
    affine,
    channel_sum,
    corner,
    halves,
    load,
    merging,
    preactivation,
    slabs,
    splits,
    spread,
    sweep,
    tile,
)


@triton.jit(do_not_specialize=OF_BATCH)
def _batch_norm_forward_kernel(
    x_ptr,  # read, (N, C, S)
    residual_ptr,  # read, (N, C, S), or None
    weight_ptr,  # read, (C,), or None
    bias_ptr,  # read, (C,), or None
    running_mean_ptr,  # updated, (C,), or None
    running_var_ptr,  # updated, (C,), or None
    mean_ptr,  # written, (C,), float64
    invstd_ptr,  # written, (C,), float32
    y_ptr,  # written, (N, C, S)
    N,
    C,
    S,
    count,  # n = N · S
    unbias,  # n / (n - 1)
    momentum,
    eps,
    ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Training in one read: a program holds the whole slabs of BLOCK_C channels."""
    c0 = tl.program_id(0) * BLOCK_C
    c = c0 + tl.arange(0, BLOCK_C)
    offsets, exists = tile(0, c0, 0, N, C, S, BLOCK_N, BLOCK_C, BLOCK_S)
    x = load(x_ptr, offsets, exists)
    near = channel_sum(x) / count
    mean = near.to(tl.float64) + (channel_sum(tl.where(exists, x - spread(near), 0.0)) / count).to(tl.float64)
    center, rest = halves(mean)
    x -= spread(center)  # in its place: registers have room for one such tile
    deviation = tl.where(exists, x - spread(rest), 0.0)
    var = channel_sum(deviation * deviation) / count
    invstd = _write_statistics(
        mean, var, c, C, running_mean_ptr, running_var_ptr, mean_ptr, invstd_ptr, unbias, momentum, eps
    )
    _, scale, shift = affine(mean, invstd, weight_ptr, bias_ptr, c, c < C)
    z = preactivation(x, scale, shift, residual_ptr, offsets, exists)
    tl.store(y_ptr + offsets, activate(z, ACTIVATION), mask=exists)


@triton.jit(do_not_specialize=OF_BATCH)
def _batch_norm_moments_kernel(
    x_ptr,  # read, (N, C, S)
    partials_ptr,  # written, (3, SPLITS, C), float64: count, mean and m2
    N,
    C,
    S,
    SPLITS,
    tiles,  # of a group
    tiles_per_split,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """First sweep of training: the moments of BLOCK_C channels over some of their tiles, merged by Chan's formula."""
    split = tl.program_id(0) % SPLITS
    c0 = tl.program_id(0) // SPLITS * BLOCK_C
    first = split * tiles_per_split
    n0, s0 = corner(first, S, BLOCK_N, BLOCK_S)
    # Deviations from a value near the mean lose nothing where the mean is large: that of the first tile.
    offsets, exists = tile(n0, c0, s0, N, C, S, BLOCK_N, BLOCK_C, BLOCK_S)
    near = channel_sum(load(x_ptr, offsets, exists)) / _count(n0, s0, N, S, BLOCK_N, BLOCK_S)
    count = 0.0
    mean = tl.zeros([BLOCK_C], tl.float32)
    m2 = tl.zeros([BLOCK_C], tl.float32)
    for index in range(first, tl.minimum(first + tiles_per_split, tiles)):
        n0, s0 = corner(index, S, BLOCK_N, BLOCK_S)
        offsets, exists = tile(n0, c0, s0, N, C, S, BLOCK_N, BLOCK_C, BLOCK_S)
        x = tl.where(exists, load(x_ptr, offsets, exists) - spread(near), 0.0)
        tile_count = _count(n0, s0, N, S, BLOCK_N, BLOCK_S)
        tile_mean = channel_sum(x) / tile_count
        deviation = tl.where(exists, x - spread(tile_mean), 0.0)
        apart, share = tile_mean - mean, tile_count / (count + tile_count)
        m2 += channel_sum(deviation * deviation) + apart * apart * (count * share)
        mean += apart * share
        count += tile_count
    c = c0 + tl.arange(0, BLOCK_C)
    partial_ptr = partials_ptr + split * C + c
    tl.store(partial_ptr, tl.zeros([BLOCK_C], tl.float64) + count, mask=c < C)
    tl.store(partial_ptr + SPLITS * C, near.to(tl.float64) + mean.to(tl.float64), mask=c < C)
    tl.store(partial_ptr + 2 * SPLITS * C, m2.to(tl.float64), mask=c < C)


@triton.jit(do_not_specialize=OF_BATCH)
def _batch_norm_statistics_kernel(
    partials_ptr,  # read, (3, SPLITS, C), float64: count, mean and m2
    running_mean_ptr,  # updated, (C,), or None
    running_var_ptr,  # updated, (C,), or None
    mean_ptr,  # written, (C,), float64
    invstd_ptr,  # written, (C,), float32
    C,
    SPLITS,
    count,
    unbias,
    momentum,
    eps,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Between the sweeps: merge the moments of all splits of BLOCK_C channels."""
    p = tl.arange(0, BLOCK_P)[:, None]
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    exists = (p < SPLITS) & (c < C)[None, :]
    partial_ptr = partials_ptr + p * C + c[None, :]
    counts = tl.load(partial_ptr, mask=exists, other=0.0)
    means = tl.load(partial_ptr + SPLITS * C, mask=exists, other=0.0)
    m2 = tl.load(partial_ptr + 2 * SPLITS * C, mask=exists, other=0.0)
    # Not by `count`: as float32 that is not exact beyond 2²⁴ values, and a large mean would show it.
    mean = tl.sum(counts * means, axis=0) / tl.maximum(tl.sum(counts, axis=0), 1.0)
    apart = means - mean[None, :]
    var = (tl.sum(m2 + counts * apart * apart, axis=0) / count).to(tl.float32)
    _write_statistics(mean, var, c, C, running_mean_ptr, running_var_ptr, mean_ptr, invstd_ptr, unbias, momentum, eps)


@triton.jit(do_not_specialize=OF_BATCH)
def _batch_norm_normalize_kernel(
    x_ptr,  # read, (N, C, S)
    residual_ptr,  # read, (N, C, S), or None
    weight_ptr,  # read, (C,), or None
    bias_ptr,  # read, (C,), or None
    mean_ptr,  # read, (C,), float64
    invstd_ptr,  # read, (C,), float32
    y_ptr,  # written, (N, C, S)
    N,
    C,
    S,
    groups,
    ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Second sweep of training: y, a tile a program."""
    c0 = tl.program_id(0) % groups * BLOCK_C
    c = c0 + tl.arange(0, BLOCK_C)
    mean = tl.load(mean_ptr + c, mask=c < C, other=0.0)
    center, scale, shift = affine(mean, load(invstd_ptr, c, c < C), weight_ptr, bias_ptr, c, c < C)
    n0, s0 = corner(tl.program_id(0) // groups, S, BLOCK_N, BLOCK_S)
    offsets, exists = tile(n0, c0, s0, N, C, S, BLOCK_N, BLOCK_C, BLOCK_S)
    deviation = load(x_ptr, offsets, exists) - spread(center)
    z = preactivation(deviation, scale, shift, residual_ptr, offsets, exists)
    tl.store(y_ptr + offsets, activate(z, ACTIVATION), mask=exists)


@triton.jit(do_not_specialize=OF_BATCH)
def _batch_norm_inference_kernel(
    x_ptr,  # read, (N, C, S)
    residual_ptr,  # read, (N, C, S), or None
    weight_ptr,  # read, (C,), or None
    bias_ptr,  # read, (C,), or None
    running_mean_ptr,  # read, (C,)
    running_var_ptr,  # read, (C,)
    mean_ptr,  # written, (C,), float64
    invstd_ptr,  # written, (C,), float32
    y_ptr,  # written, (N, C, S)
    N,
    C,
    S,
    groups,
    eps,
    ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Inference: y in one sweep, a tile a program. The first tile's programs write the statistics."""
    c0 = tl.program_id(0) % groups * BLOCK_C
    index = tl.program_id(0) // groups
    c = c0 + tl.arange(0, BLOCK_C)
    mean = tl.load(running_mean_ptr + c, mask=c < C, other=0.0).to(tl.float64)
    invstd = tl.div_rn(1.0, tl.sqrt_rn(load(running_var_ptr, c, c < C) + eps))
    if index == 0:
        tl.store(mean_ptr + c, mean, mask=c < C)
        tl.store(invstd_ptr + c, invstd, mask=c < C)
    center, scale, shift = affine(mean, invstd, weight_ptr, bias_ptr, c, c < C)
    n0, s0 = corner(index, S, BLOCK_N, BLOCK_S)
    offsets, exists = tile(n0, c0, s0, N, C, S, BLOCK_N, BLOCK_C, BLOCK_S)
    deviation = load(x_ptr, offsets, exists) - spread(center)
    z = preactivation(deviation, scale, shift, residual_ptr, offsets, exists)
    tl.store(y_ptr + offsets, activate(z, ACTIVATION), mask=exists)


@triton.jit
def _count(n0, s0, N, S, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr):
    """Values that a tile holds of each channel."""
    return (tl.minimum(N - n0, BLOCK_N) * tl.minimum(S - s0, BLOCK_S)).to(tl.float32)


@triton.jit
def _write_statistics(mean, var, c, C, running_mean_ptr, running_var_ptr, mean_ptr, invstd_ptr, unbias, momentum, eps):
    """Write mean and invstd, move the running statistics, and return invstd."""
    invstd = tl.div_rn(1.0, tl.sqrt_rn(var + eps))
    tl.store(mean_ptr + c, mean, mask=c < C)
    tl.store(invstd_ptr + c, invstd, mask=c < C)
    if running_mean_ptr is not None:
        old = load(running_mean_ptr, c, c < C)
        tl.store(running_mean_ptr + c, (1.0 - momentum) * old + momentum * mean.to(tl.float32), mask=c < C)
    if running_var_ptr is not None:
        old = load(running_var_ptr, c, c < C)
        tl.store(running_var_ptr + c, (1.0 - momentum) * old + momentum * (var * unbias), mask=c < C)
    return invstd


def batch_norm_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    activation: str | None,
    shape: tuple[int, int, int],
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, invstd) of training. `shape` is (N, C, S), as x and residual lie in memory."""
    y, mean, invstd = _outputs(x, shape[1])
    count = shape[0] * shape[2]
    statistics = (running_mean, running_var, mean, invstd)
    numbers = (float(count), count / (count - 1), momentum, eps)
    if tiling := slabs(shape, tensors=1 if residual is None else 2):
        _batch_norm_forward_kernel[(tiling.groups,)](
            x, residual, weight, bias, *statistics, y, *shape, *numbers, **tiling.constants(ACTIVATION=activation)
        )
        return y, mean, invstd
    tiling = sweep(shape)
    programs, tiles = splits(tiling, x.device)
    partials = torch.empty((3, programs, shape[1]), dtype=torch.float64, device=x.device)
    _batch_norm_moments_kernel[(tiling.groups * programs,)](
        x, partials, *shape, programs, tiling.tiles, tiles, **tiling.constants()
    )
    merge = merging(programs, shape[1])
    _batch_norm_statistics_kernel[(triton.cdiv(shape[1], merge["BLOCK_C"]),)](
        partials, *statistics, shape[1], programs, *numbers, **merge
    )
    _batch_norm_normalize_kernel[_grid(tiling)](
        x, residual, weight, bias, mean, invstd, y, *shape, tiling.groups, **tiling.constants(ACTIVATION=activation)
    )
    return y, mean, invstd


def batch_norm_inference(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    activation: str | None,
    shape: tuple[int, int, int],
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, invstd) with the running statistics. `shape` is (N, C, S), as x and residual lie in memory."""
    y, mean, invstd = _outputs(x, shape[1])
    tiling = sweep(shape)
    _batch_norm_inference_kernel[_grid(tiling)](
        *(x, residual, weight, bias, running_mean, running_var, mean, invstd, y),
        *(*shape, tiling.groups, eps),
        **tiling.constants(ACTIVATION=activation),
    )
    return y, mean, invstd


def _outputs(x: Tensor, channels: int) -> tuple[Tensor, Tensor, Tensor]:
    mean = torch.empty(channels, dtype=torch.float64, device=x.device)
    return torch.empty_like(x), mean, torch.empty(channels, dtype=torch.float32, device=x.device)


def _grid(tiling: Tiling) -> tuple[int]:
    return (tiling.tiles * tiling.groups,)
