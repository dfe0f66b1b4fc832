"""The two orders in memory that kernels read: contiguous, and rows, with the channel innermost."""

from __future__ import annotations

import torch
from torch import Tensor


def is_rows(x: Tensor) -> bool:
    """Whether x is dense with the channel innermost: channels_last, channels_last_3d, (N, C), or of any dimension."""
    if x.dim() == 4:  # the same, in a seventh of the time
        return x.is_contiguous(memory_format=torch.channels_last)
    return x.movedim(1, -1).is_contiguous()


def laid_out(x: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """x as the kernels read it, and its (outer, channels, inner): itself, or where its strides fit neither, a copy."""
    samples, channels, *_ = x.shape
    if x.is_contiguous():
        return x, (samples, channels, x.numel() // (samples * channels))
    if is_rows(x):
        return x, (x.numel() // channels, channels, 1)
    if x.stride(1) == 1:
        return x.movedim(1, -1).contiguous().movedim(-1, 1), (x.numel() // channels, channels, 1)
    return x.contiguous(), (samples, channels, x.numel() // (samples * channels))
