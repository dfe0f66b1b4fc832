"""Settings that are measured on the machine at hand."""

from __future__ import annotations

import statistics
import time

import torch
from torch import nn

_WORTH = 1.2
_ROUNDS = 5


def fast_precision(device: torch.device) -> str:
    """`"bf16-mixed"` where a training step of a convolution is at least 1.2 times as fast in it, else `"32-true"`.

    Measured in a fraction of a second on a 3×3 convolution of 64 channels. Processors without bfloat16 instructions
    emulate them, slowly.
    """
    if device.type == "mps":
        return "32-true"
    layer = nn.Conv2d(64, 64, 3, padding=1).to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    x = torch.randn(32, 64, 32, 32, device=device).to(memory_format=torch.channels_last).requires_grad_()
    times: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(_ROUNDS + 1):  # the first round warms up
        for bf16, seconds in times.items():
            seconds.append(_step_seconds(layer, x, bf16))
    plain, half = (statistics.median(times[bf16][1:]) for bf16 in (False, True))
    return "bf16-mixed" if plain > _WORTH * half else "32-true"


def _step_seconds(layer: nn.Module, x: torch.Tensor, bf16: bool) -> float:
    start = time.perf_counter()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
        y = layer(x)
    y.backward(y.detach())
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start
