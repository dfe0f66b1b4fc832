"""The moments of a batch, a channel at a time: measured once, merged exactly, over any split of the data."""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.distributed as dist
from torch import Tensor


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which statistics of data of type `dtype` are kept: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _rounded_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """`a + b` as its rounded value and the error of that rounding (Knuth, TAOCP 2, section 4.2.2, theorem B)."""
    total = a + b
    b_part = total - a
    return total, (a - (total - b_part)) + (b - b_part)


def _at_least_one(count: int | Tensor) -> int | Tensor:
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean and sum of squared deviations, `m2 = Σ (x - mean)²`, of a set of values for each channel.

    `Moments.of(a).merge(Moments.of(b))` equals `Moments.of(a and b together)` up to rounding, whatever the split and
    whatever the data's offset: nothing is ever formed as E[x²] - E[x]², which cancels to noise once the mean exceeds
    the standard deviation by 1/√ulp, some 3,000 times in float32.

    References:
        Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.

    Attributes:
        count: values a channel; an `int`, or after `all_reduce` a float64 tensor without dimensions. A tensor of mean's
            shape where the channels of layers with different counts are merged at once.
        mean: their mean, shape (C,).
        m2: the sum of their squared deviations from the mean, shape (C,).
        mean_error: what rounding took off `mean`, shape (C,); the true mean is `mean + mean_error`. With a mean of 1e4
            and a standard deviation of 1e-2, float32 rounds the mean by up to 5% of the deviation: enough to spoil a
            merged variance.
    """

    count: int | Tensor
    mean: Tensor
    m2: Tensor
    mean_error: Tensor = None  # pyright: ignore[reportAssignmentType] - zeros, once made

    def __post_init__(self) -> None:
        if self.mean_error is None:
            object.__setattr__(self, "mean_error", torch.zeros_like(self.mean))

    @staticmethod
    def of(x: Tensor, dims: tuple[int, ...] | None = None) -> Moments:
        """Moments of `x` over the dimensions `dims`; the dimensions left make up the channels.

        Two passes: the mean, then the deviations from it, whose own mean corrects the first (Chan et al., section 3).
        Values are float32 for data of at most 32 bits, else float64. Differentiable to any order.

        Args:
            x: floating-point tensor of any layout.
            dims: dimensions to reduce, not empty; None for all but 1, where (N, C, *) has its channels. One dimension,
                (N,), is one channel's values, and its moments have no dimensions.
        """
        dims = (0, *range(2, x.dim())) if dims is None else dims
        x = x.to(statistics_dtype(x.dtype))
        count = math.prod([x.shape[d] for d in dims])
        size = max(count, 1)
        rough_mean = x.sum(dims, keepdim=True) / size
        deviation = x - rough_mean
        error = deviation.sum(dims, keepdim=True) / size
        m2 = (deviation - error).square().sum(dims)
        mean, mean_error = _rounded_sum(rough_mean.squeeze(dims), error.squeeze(dims))
        return Moments(count, mean, m2, mean_error)

    @staticmethod
    def empty(channels: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Moments:
        """Moments of no values at all: the neutral element of `merge`. Shape (channels,)."""
        zeros = torch.zeros(channels, dtype=statistics_dtype(dtype), device=device)
        return Moments(0, zeros, zeros.clone())

    def merge(self, other: Moments) -> Moments:
        """Moments of both sets of values together.

        With δ = mean_b - mean_a and n = n_a + n_b:  mean = mean_a + δ n_b/n,  m2 = m2_a + m2_b + δ² n_a n_b/n.
        """
        count = self.count + other.count
        share = other.count / _at_least_one(count)
        delta, delta_error = other.mean - self.mean, other.mean_error - self.mean_error
        mean, rest = _rounded_sum(self.mean, delta * share)
        mean, mean_error = _rounded_sum(mean, rest + (self.mean_error + delta_error * share))
        m2 = self.m2 + other.m2 + (delta + delta_error).square() * (self.count * share)
        return Moments(count, mean, m2, mean_error)

    def variance(self, unbiased: bool = False) -> Tensor:
        """m2/n, or with `unbiased` m2/(n - 1). NaN where too few values define it. Shape (C,)."""
        degrees = self.count - int(unbiased)
        return self.m2 / (degrees.clamp(min=0) if isinstance(degrees, Tensor) else max(degrees, 0))

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> Moments:
        """Moments over all ranks of `group`, the same bits on each; ranks may differ in count, and be empty.

        One collective: each rank's count, mean and m2 travel as one float64 vector. Works on any backend, gloo
        included. Not differentiable. Every rank of the group has to call it.

        Args:
            group: process group; the default group if None.
        """
        mine = packed(self.count, self.mean.double() + self.mean_error, self.m2).detach()
        gathered = mine.new_empty(dist.get_world_size(group), *mine.shape)
        dist.all_gather(list(gathered), mine, group=group)
        count, mean, m2 = merged(gathered)
        rounded = mean.to(self.mean.dtype)
        shape, dtype = self.mean.shape, self.mean.dtype
        return Moments(count, rounded.view(shape), m2.to(dtype).view(shape), (mean - rounded).to(dtype).view(shape))


def packed(count: int | Tensor, mean: Tensor, m2: Tensor) -> Tensor:
    """Count, mean and m2 as one float64 vector (1 + 2 C), to send."""
    head = torch.as_tensor(count, dtype=torch.float64, device=mean.device)
    return torch.cat([head.reshape(1), mean.double().flatten(), m2.double().flatten()])


def merged(parts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean (C,) and m2 (C,), in float64, of all the moments in `parts`, (R, 1 + 2 C), one `packed` a row.

    All at once rather than pair by pair, since R may be in the thousands: with δᵣ = meanᵣ - mean of the largest part,

        n = Σ nᵣ,   mean = mean of the largest + Σ nᵣ δᵣ / n,   m2 = Σ m2ᵣ + Σ nᵣ (meanᵣ - mean)²
    """
    counts, (means, m2s) = parts[:, :1], parts[:, 1:].chunk(2, dim=1)
    count = counts.sum()
    share = counts / count.clamp(min=1)
    # By index_select: an index that is a tensor, so that no device is waited for.
    base = means.index_select(0, counts.argmax(0))
    shift = (share * (means - base)).sum(0)
    m2 = (m2s + counts * (means - base - shift).square()).sum(0)
    return count, base[0] + shift, m2
