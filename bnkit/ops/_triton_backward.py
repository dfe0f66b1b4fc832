"""The backward pass in Triton. Where a channel's slab fits in registers x and dy are read once, else twice.

Throughout, g = dy · activation'(z), with z recomputed as the forward pass had it; sums are Σ g and Σ g · x̂, a channel
each. Partial sums are stored and added in a fixed order, without atomics: results are the same from run to run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton_tiles import (
    OF_BATCH,
    activation_gradient,
    affine,
    channel_sum,
    corner,
    halves,
    load,
    load_or,
    merging,
    preactivation,
    slabs,
    splits,
    spread,
    sweep,
    tile,
)

_Inputs = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor, Tensor]
"""What every kernel reads: dy, x, residual, weight, bias, mean, invstd."""


@triton.jit(do_not_specialize=OF_BATCH)
def _batch_norm_backward_kernel(
    dy_ptr,  # read, (N, C, S)
    x_ptr,  # read, (N, C, S)
    residual_ptr,  # read, (N, C, S), or None
    weight_ptr,  # read, (C,), or None
    bias_ptr,  # read, (C,), or None
    mean_ptr,  # read, (C,), float64
    invstd_ptr,  # read, (C,), float32
    dx_ptr,  # written, (N, C, S), or None
    dresidual_ptr,  # written, (N, C, S), or None
    dweight_ptr,  # written, (C,), or None
    dbias_ptr,  # written, (C,), or None
    N,
    C,
    S,
    count,  # n = N · S
    TRAINING: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """All gradients in one read: a program holds the whole slabs of BLOCK_C channels."""
    c0 = tl.program_id(0) * BLOCK_C
    c = c0 + tl.arange(0, BLOCK_C)
    offsets, exists = tile(0, c0, 0, N, C, S, BLOCK_N, BLOCK_C, BLOCK_S)
    g, xhat = _gradient_and_xhat(
        dy_ptr, x_ptr, residual_ptr, weight_ptr, bias_ptr, mean_ptr, invstd_ptr, c, C, offsets, exists, ACTIVATION
    )
    sum_g, sum_gx = channel_sum(g), channel_sum(g * xhat)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + c, sum_g, mask=c < C)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + c, sum_gx, mask=c < C)
    if dresidual_ptr is not None:
        tl.store(dresidual_ptr + offsets, g, mask=exists)
    if dx_ptr is not None:
        scale = load_or(weight_ptr, c, c < C, 1.0) * load(invstd_ptr, c, c < C)
        dx = _dx(g, xhat, scale, sum_g / count, sum_gx / count, TRAINING)
        tl.store(dx_ptr + offsets, dx, mask=exists)


@triton.jit(do_not_specialize=OF_BATCH)
def _batch_norm_backward_sums_kernel(
    dy_ptr,  # read, (N, C, S)
    x_ptr,  # read, (N, C, S)
    residual_ptr,  # read, (N, C, S), or None
    weight_ptr,  # read, (C,), or None
    bias_ptr,  # read, (C,), or None
    mean_ptr,  # read, (C,), float64
    invstd_ptr,  # read, (C,), float32
    partials_ptr,  # written, (2, SPLITS, C), float32: Σ g and Σ g · x̂
    N,
    C,
    S,
    SPLITS,
    tiles,  # of a group
    tiles_per_split,
    ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """First sweep: the sums of BLOCK_C channels over some of their tiles."""
    split = tl.program_id(0) % SPLITS
    c0 = tl.program_id(0) // SPLITS * BLOCK_C
    c = c0 + tl.arange(0, BLOCK_C)
    first = split * tiles_per_split
    sum_g = tl.zeros([BLOCK_N, BLOCK_C, BLOCK_S], tl.float32)
    sum_gx = tl.zeros([BLOCK_N, BLOCK_C, BLOCK_S], tl.float32)
    for index in range(first, tl.minimum(first + tiles_per_split, tiles)):
        n0, s0 = corner(index, S, BLOCK_N, BLOCK_S)
        offsets, exists = tile(n0, c0, s0, N, C, S, BLOCK_N, BLOCK_C, BLOCK_S)
        g, xhat = _gradient_and_xhat(
            dy_ptr, x_ptr, residual_ptr, weight_ptr, bias_ptr, mean_ptr, invstd_ptr, c, C, offsets, exists, ACTIVATION
        )
        sum_g += g
        sum_gx += g * xhat
    partial_ptr = partials_ptr + split * C + c
    tl.store(partial_ptr, channel_sum(sum_g), mask=c < C)
    tl.store(partial_ptr + SPLITS * C, channel_sum(sum_gx), mask=c < C)


@triton.jit(do_not_specialize=OF_BATCH)
def _batch_norm_backward_merge_kernel(
    partials_ptr,  # read, (2, SPLITS, C), float32: Σ g and Σ g · x̂
    sums_ptr,  # written, (2, C), float32
    dweight_ptr,  # written, (C,), or None
    dbias_ptr,  # written, (C,), or None
    C,
    SPLITS,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Between the sweeps: add the partial sums of BLOCK_C channels."""
    p = tl.arange(0, BLOCK_P)[:, None]
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    exists = (p < SPLITS) & (c < C)[None, :]
    sum_g = tl.sum(load(partials_ptr, p * C + c[None, :], exists), axis=0)
    sum_gx = tl.sum(load(partials_ptr + SPLITS * C, p * C + c[None, :], exists), axis=0)
    tl.store(sums_ptr + c, sum_g, mask=c < C)
    tl.store(sums_ptr + C + c, sum_gx, mask=c < C)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + c, sum_g, mask=c < C)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + c, sum_gx, mask=c < C)


@triton.jit(do_not_specialize=OF_BATCH)
def _batch_norm_backward_apply_kernel(
    dy_ptr,  # read, (N, C, S)
    x_ptr,  # read, (N, C, S)
    residual_ptr,  # read, (N, C, S), or None
    weight_ptr,  # read, (C,), or None
    bias_ptr,  # read, (C,), or None
    mean_ptr,  # read, (C,), float64
    invstd_ptr,  # read, (C,), float32
    sums_ptr,  # read, (2, C), float32: Σ g and Σ g · x̂; None without TRAINING
    dx_ptr,  # written, (N, C, S), or None
    dresidual_ptr,  # written, (N, C, S), or None
    N,
    C,
    S,
    groups,
    count,  # n = N · S
    TRAINING: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Second sweep: dx and dresidual, a tile a program."""
    c0 = tl.program_id(0) % groups * BLOCK_C
    c = c0 + tl.arange(0, BLOCK_C)
    n0, s0 = corner(tl.program_id(0) // groups, S, BLOCK_N, BLOCK_S)
    offsets, exists = tile(n0, c0, s0, N, C, S, BLOCK_N, BLOCK_C, BLOCK_S)
    g, xhat = _gradient_and_xhat(
        dy_ptr, x_ptr, residual_ptr, weight_ptr, bias_ptr, mean_ptr, invstd_ptr, c, C, offsets, exists, ACTIVATION
    )
    if dresidual_ptr is not None:
        tl.store(dresidual_ptr + offsets, g, mask=exists)
    if dx_ptr is not None:
        scale = load_or(weight_ptr, c, c < C, 1.0) * load(invstd_ptr, c, c < C)
        mean_g = load_or(sums_ptr, c, c < C, 0.0) / count
        mean_gx = load_or(sums_ptr, C + c, c < C, 0.0) / count
        tl.store(dx_ptr + offsets, _dx(g, xhat, scale, mean_g, mean_gx, TRAINING), mask=exists)


@triton.jit
def _gradient_and_xhat(
    dy_ptr, x_ptr, residual_ptr, weight_ptr, bias_ptr, mean_ptr, invstd_ptr, c, C, offsets, exists, ACTIVATION
):
    """g and x̂ of a tile; g is 0 where there is no value."""
    mean = tl.load(mean_ptr + c, mask=c < C, other=0.0)
    invstd = load(invstd_ptr, c, c < C)
    x = load(x_ptr, offsets, exists)
    g = load(dy_ptr, offsets, exists)
    if ACTIVATION is not None:
        center, scale, shift = affine(mean, invstd, weight_ptr, bias_ptr, c, c < C)
        z = preactivation(x - spread(center), scale, shift, residual_ptr, offsets, exists)
        g = activation_gradient(g, z, ACTIVATION)
    center, rest = halves(mean)
    return g, (x - spread(center)) * spread(invstd) - spread(rest * invstd)


@triton.jit
def _dx(g, xhat, scale, mean_g, mean_gx, TRAINING: tl.constexpr):
    """weight · invstd · (g - Σg/n - x̂ · Σ(g·x̂)/n), or without TRAINING weight · invstd · g."""
    if TRAINING:
        g = g - spread(mean_g) - xhat * spread(mean_gx)
    return g * spread(scale)


def batch_norm_backward(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    training: bool,
    activation: str | None,
    needs: tuple[bool, bool, bool, bool],
    shape: tuple[int, int, int],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dresidual, dweight, dbias) as far as needed. `shape` is (N, C, S), as dy, x and residual lie in memory."""
    inputs = (dy, x, residual if activation is not None else None, weight, bias, mean, invstd)
    dx = torch.empty_like(x) if needs[0] else None
    dresidual = torch.empty_like(x) if needs[1] and activation is not None else None
    dweight = torch.empty_like(weight) if needs[2] and weight is not None else None
    dbias = torch.empty_like(bias) if needs[3] and bias is not None else None
    summing = dweight is not None or dbias is not None or (training and dx is not None)
    constants = {"TRAINING": training, "ACTIVATION": activation}
    count = float(shape[0] * shape[2])
    tiling = slabs(shape, tensors=2) if summing else None
    if tiling:
        _batch_norm_backward_kernel[(tiling.groups,)](
            *inputs, dx, dresidual, dweight, dbias, *shape, count, **tiling.constants(**constants)
        )
    else:
        tiling = sweep(shape)
        sums = _batch_norm_backward_sums(inputs, activation, dweight, dbias, shape) if summing else None
        if dx is not None or dresidual is not None:
            _batch_norm_backward_apply_kernel[(tiling.tiles * tiling.groups,)](
                *inputs, sums, dx, dresidual, *shape, tiling.groups, count, **tiling.constants(**constants)
            )
    return dx, dy if needs[1] and activation is None else dresidual, dweight, dbias


def _batch_norm_backward_sums(
    inputs: _Inputs,
    activation: str | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    shape: tuple[int, int, int],
) -> Tensor:
    """Write dweight and dbias; return Σ g and Σ g · x̂ unrounded, (2, C)."""
    channels, device, tiling = shape[1], inputs[0].device, sweep(shape)
    programs, tiles = splits(tiling, device)
    partials = torch.empty((2, programs, channels), dtype=torch.float32, device=device)
    sums = torch.empty((2, channels), dtype=torch.float32, device=device)
    _batch_norm_backward_sums_kernel[(tiling.groups * programs,)](
        *inputs, partials, *shape, programs, tiling.tiles, tiles, **tiling.constants(ACTIVATION=activation)
    )
    merge = merging(programs, channels)
    _batch_norm_backward_merge_kernel[(triton.cdiv(channels, merge["BLOCK_C"]),)](
        partials, sums, dweight, dbias, channels, programs, **merge
    )
    return sums
