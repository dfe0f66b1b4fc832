"""What the Triton kernels share: tiles of a tensor, sums over channels, activations, and the sizes of blocks.

Every layout is (N, C, S) in memory, value (n, c, s) at (n · C + c) · S + s: for a contiguous tensor S is the size of a
plane (H · W); for channels_last and (N, C), in which the channel is innermost, S is 1 and N counts the rows. A tile is
a box of BLOCK_N × BLOCK_C × BLOCK_S values, and all kernels are written once, for tiles.

The sizes below come from counting registers and bytes. They have not been tuned on hardware.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

RESIDENT_VALUES = 32768
"""Values that one program keeps in registers, as float32: half of a multiprocessor's 65536 registers."""
TILE_VALUES = 4096
"""Values of a tile in a sweep."""
VALUES_PER_WARP = 512
RUN_OF_SLAB = 16
"""Values next to each other in memory that a tile spans at least, where a program holds whole channels: a sector of
32 bytes or more, yet few channels a program, so that there are programs for all multiprocessors."""
RUN_OF_SWEEP = 64
PROGRAMS_PER_PROCESSOR = 4
MOST_SPLITS = 1024
OPTIONS = {"enable_fp_fusion": True}
OF_BATCH = ("N", "SPLITS", "tiles", "tiles_per_split")
"""Arguments of kernels that follow from the batch's size: not specialized, so that few sizes compile a kernel anew."""


class Tiling(NamedTuple):
    """How a tensor (N, C, S) is cut: the sizes of a tile, all powers of two, and how many there are."""

    n: int
    c: int
    s: int
    groups: int
    """Groups of channels: ceil(C / c)."""
    tiles: int
    """Tiles of each group."""

    def constants(self, **others: Any) -> dict[str, Any]:
        """What a kernel on these tiles is compiled for: their sizes, how many warps, and `others`."""
        warps = min(16, max(1, self.n * self.c * self.s // VALUES_PER_WARP))
        return {"BLOCK_N": self.n, "BLOCK_C": self.c, "BLOCK_S": self.s, "num_warps": warps, **OPTIONS, **others}


def slabs(shape: tuple[int, int, int], tensors: int) -> Tiling | None:
    """One tile a group, of its channels' whole slabs; None where `tensors` of them are too large for registers."""
    N, C, S = shape
    n, s = _power_of_two(N), _power_of_two(S)
    c = min(_power_of_two(C), max(1, RUN_OF_SLAB // s))
    return Tiling(n, c, s, triton.cdiv(C, c), 1) if n * c * s * tensors <= RESIDENT_VALUES else None


def sweep(shape: tuple[int, int, int]) -> Tiling:
    """Tiles of about `TILE_VALUES`, with as little of them beyond the planes' ends as can be."""
    N, C, S = shape
    sizes = [size for size in (2048, 1024, 512, 256) if size < S]
    s = min(sizes, key=lambda size: triton.cdiv(S, size) * size) if sizes else _power_of_two(S)
    c = min(_power_of_two(C), max(1, RUN_OF_SWEEP // s))
    n = min(_power_of_two(N), max(1, TILE_VALUES // (c * s)))
    return Tiling(n, c, s, triton.cdiv(C, c), triton.cdiv(N, n) * triton.cdiv(S, s))


def splits(tiling: Tiling, device: torch.device) -> tuple[int, int]:
    """(programs a group, tiles a program) for sums over channels: enough programs for the device, none of them idle."""
    wanted = triton.cdiv(PROGRAMS_PER_PROCESSOR * _processors(device), tiling.groups)
    tiles = triton.cdiv(tiling.tiles, min(wanted, MOST_SPLITS))
    return triton.cdiv(tiling.tiles, tiles), tiles


def merging(programs: int, channels: int) -> dict[str, Any]:
    """The block of a kernel that merges what `programs` found for each channel: all of them × some channels."""
    block = _power_of_two(programs)
    return {"BLOCK_P": block, "BLOCK_C": min(_power_of_two(channels), max(1, 2048 // block)), **OPTIONS}


def _power_of_two(n: int) -> int:
    return triton.next_power_of_2(n)


@cache
def _processors(device: torch.device) -> int:
    # Tensors of the CPU are the interpreter's.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@triton.jit
def tile(n0, c0, s0, N, C, S, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr):
    """Offsets of the tile's values, and which of them exist. In 64 bits: a tensor may have more than 2³¹ values."""
    n = n0 + tl.arange(0, BLOCK_N)[:, None, None]
    c = c0 + tl.arange(0, BLOCK_C)[None, :, None]
    s = s0 + tl.arange(0, BLOCK_S)[None, None, :]
    return (n.to(tl.int64) * C + c) * S + s, (n < N) & (c < C) & (s < S)


@triton.jit
def corner(index, S, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr):
    """Where tile `index` of a group starts: (n, s)."""
    across = tl.cdiv(S, BLOCK_S)
    index = tl.cast(index, tl.int64)
    return index // across * BLOCK_N, index % across * BLOCK_S


@triton.jit
def spread(channel):
    """A value a channel, against a tile."""
    return channel[None, :, None]


@triton.jit
def channel_sum(values):
    """Σ over a tile's n and s, a channel each."""
    return tl.sum(tl.sum(values, axis=2), axis=0)


@triton.jit
def load(pointer, offsets, exists):
    """Values of any type, as float32; 0 where there is none."""
    return tl.load(pointer + offsets, mask=exists, other=0.0).to(tl.float32)


@triton.jit
def load_or(pointer, offsets, exists, default):
    """`load`, or `default` where there is no such tensor."""
    values = tl.full(offsets.shape, default, tl.float32)
    if pointer is not None:
        values = load(pointer, offsets, exists)
    return values


@triton.jit
def halves(mean):
    """A float64 mean as the sum of two float32: what rounding takes off it shows against a small deviation."""
    center = mean.to(tl.float32)
    return center, (mean - center.to(tl.float64)).to(tl.float32)


@triton.jit
def affine(mean, invstd, weight_ptr, bias_ptr, c, exists):
    """(center, scale, shift) such that weight · x̂ + bias = (x - center) · scale + shift, a channel each."""
    center, rest = halves(mean)
    scale = load_or(weight_ptr, c, exists, 1.0) * invstd
    return center, scale, load_or(bias_ptr, c, exists, 0.0) - rest * scale


@triton.jit
def preactivation(deviation, scale, shift, residual_ptr, offsets, exists):
    """z = weight · x̂ + bias + residual of a tile, of x - center: the same in the forward and in the backward pass."""
    z = deviation * spread(scale) + spread(shift)
    if residual_ptr is not None:
        z += load(residual_ptr, offsets, exists)
    return z


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """activation(z), NaN for NaN."""
    if ACTIVATION == "relu":
        z = tl.where(z <= 0.0, 0.0, z)
    elif ACTIVATION == "leaky_relu":
        z = tl.where(z > 0.0, z, 0.01 * z)
    elif ACTIVATION == "silu":
        z = z * sigmoid(z)
    elif ACTIVATION == "gelu":
        z = z * normal_cdf(z)
    elif ACTIVATION == "hardswish":
        z = tl.where(z <= -3.0, 0.0, tl.where(z >= 3.0, z, z * (z + 3.0) * (1.0 / 6.0)))
    elif ACTIVATION == "sigmoid":
        z = sigmoid(z)
    elif ACTIVATION == "tanh":
        z = tanh(z)
    else:
        tl.static_assert(ACTIVATION is None)
    return z


@triton.jit
def activation_gradient(dy, z, ACTIVATION: tl.constexpr):
    """dy · activation'(z)."""
    if ACTIVATION == "relu":
        dy = tl.where(z <= 0.0, 0.0, dy)
    elif ACTIVATION == "leaky_relu":
        dy = tl.where(z > 0.0, dy, 0.01 * dy)
    elif ACTIVATION == "silu":
        s = sigmoid(z)
        dy = dy * (s * (1.0 + z * (1.0 - s)))
    elif ACTIVATION == "gelu":
        dy = dy * (normal_cdf(z) + z * tl.exp(-0.5 * z * z) * 0.3989422804014327)
    elif ACTIVATION == "hardswish":
        dy = tl.where(z <= -3.0, 0.0, tl.where(z >= 3.0, dy, dy * (z * (1.0 / 3.0) + 0.5)))
    elif ACTIVATION == "sigmoid":
        s = sigmoid(z)
        dy = dy * (s * (1.0 - s))
    elif ACTIVATION == "tanh":
        t = tanh(z)
        dy = dy * (1.0 - t * t)
    else:
        tl.static_assert(ACTIVATION is None)
    return dy


@triton.jit
def sigmoid(z):
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def normal_cdf(z):
    return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))


@triton.jit
def tanh(z):
    """A near-minimax polynomial where 1 - 2 / (exp(2|z|) + 1) would cancel, that elsewhere."""
    size, s = tl.abs(z), z * z
    p = s * -0.00545349424 + 0.0204129146
    p = p * s - 0.0536705343
    p = p * s + 0.133306229
    p = p * s - 0.333332525
    far = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    return tl.where(size < 0.66, p * s * z + z, tl.where(z < 0.0, -far, far))
