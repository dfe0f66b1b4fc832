"""How a batch norm lays its output out in memory, which views of that output rely on."""

from __future__ import annotations

import torch

from ..graph import Value

_FORMATS = (torch.contiguous_format, torch.channels_last, torch.channels_last_3d)


def restored_format(source: Value, result: Value) -> torch.memory_format | None:
    """The format of `result`, if `source` of the same shape lies in memory otherwise; None if it does not."""
    if _steps(source) == _steps(result):
        return None
    like = torch.empty_strided(result.shape, result.strides, device="meta")
    dims = {torch.channels_last: 4, torch.channels_last_3d: 5}
    fitting = (format for format in _FORMATS if dims.get(format, like.dim()) == like.dim())
    return next((format for format in fitting if like.is_contiguous(memory_format=format)), None)


def _steps(value: Value) -> list[int]:
    return [stride for size, stride in zip(value.shape, value.strides, strict=False) if size > 1]
