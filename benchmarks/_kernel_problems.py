"""What `bench_kernels` measures: shapes from known networks, and who computes batch norm, add and ReLU on them."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from _kernel_peers import OTHERS
from torch import Tensor, nn

import bnkit.nn


@dataclasses.dataclass(frozen=True)
class Problem:
    """y = relu(batch_norm(x) + residual) in training, forward and backward."""

    name: str
    shape: tuple[int, ...]
    residual: bool = False
    dtype: torch.dtype = torch.float32
    channels_last: bool = False

    @property
    def bytes(self) -> int:
        """Of one tensor of the shape."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def passes(self, device: str) -> int:
        """Over memory, with each channel kept in cache: read x, write y; read x and dy, write dx. A residual is read
        once, and its gradient is written. On a GPU, those of the way that the kernels take: the backward pass reads
        the residual too, and what does not fit in registers is read twice, but for the residual in the forward pass."""
        if device != "cuda":
            return 7 if self.residual else 5
        from bnkit.ops._triton_tiles import slabs

        batch, channels, *sizes = self.shape
        plane, residual = torch.Size(sizes).numel(), int(self.residual)
        shape = (batch * plane, channels, 1) if self.channels_last else (batch, channels, plane)
        forward = 2 + residual + (slabs(shape, tensors=1 + residual) is None)
        return forward + 3 + 2 * residual + (2 + residual) * (slabs(shape, tensors=2) is None)

    @property
    def layout(self) -> str:
        return "channels_last" if self.channels_last else "contiguous"


SHAPES = [
    Problem("ResNet-50 stem, batch 32", (32, 64, 112, 112)),
    Problem("ResNet-50 stage 1, batch 32", (32, 256, 56, 56), residual=True),
    Problem("ResNet-50 stage 2, batch 32", (32, 512, 28, 28)),
    Problem("ResNet-50 stage 3, batch 32", (32, 256, 14, 14)),
    Problem("ResNet-50 stage 4, batch 32", (32, 512, 7, 7)),
    Problem("ResNet-50 stage 1, batch 8", (8, 64, 56, 56)),
    Problem("ResNet-20 stage 1, batch 512", (512, 16, 32, 32)),
    Problem("ResNet-20 stage 1, batch 128", (128, 16, 32, 32), residual=True),
    Problem("ResNet-20 stage 2, batch 128", (128, 32, 16, 16)),
    Problem("ResNet-20 stage 3, batch 128", (128, 64, 8, 8), residual=True),
    Problem("DenseNet-121 block 1, batch 16", (16, 128, 56, 56)),
    Problem("DenseNet-121 block 3, batch 16", (16, 512, 14, 14)),
    Problem("MLP of Ioffe and Szegedy", (60, 100)),
]
QUICK = {"ResNet-50 stem, batch 32", "ResNet-50 stage 1, batch 8", "MLP of Ioffe and Szegedy"}


def problems(quick: bool, device: str) -> list[Problem]:
    """Each shape in each type and layout; the few of `QUICK`, or all."""
    dtypes = (torch.float32, torch.bfloat16, *([torch.float16] if device == "cuda" else []))
    shapes = [shape for shape in SHAPES if not quick or shape.name in QUICK]
    return [
        dataclasses.replace(shape, dtype=dtype, channels_last=channels_last)
        for shape, dtype, channels_last in itertools.product(shapes, dtypes, (False, True))
        if len(shape.shape) == 4 or not channels_last
    ]


def last_level_cache() -> int:
    """Bytes of the processor's L3, but at most 16 MiB a core: virtual machines report all of it, and have a part."""
    size, share = Path("/sys/devices/system/cpu/cpu0/cache/index3/size"), (os.cpu_count() or 1) << 24
    return min(int(size.read_text().strip().removesuffix("K")) << 10, share) if size.exists() else share


class Eager(nn.Module):
    """What most people write."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        kind = nn.BatchNorm2d if len(problem.shape) == 4 else nn.BatchNorm1d
        self.bn = kind(problem.shape[1])

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = self.bn(x)
        return F.relu(y if residual is None else y + residual)


def _bnkit(problem: Problem) -> nn.Module:
    kind = bnkit.nn.BatchNorm2d if len(problem.shape) == 4 else bnkit.nn.BatchNorm1d
    return kind(problem.shape[1], activation="relu")


def sides(problem: Problem, device: str) -> dict[str, Callable[[], object]]:
    """A step forward and backward of each side, and a copy of one tensor."""

    def tensor() -> Tensor:
        t = torch.randn(problem.shape, device=device).to(problem.dtype)
        return t.contiguous(memory_format=torch.channels_last) if problem.channels_last else t

    x, dy = tensor().requires_grad_(), tensor()
    residual = tensor().requires_grad_() if problem.residual else None
    torch._dynamo.reset()
    modules = {
        "bnkit": _bnkit(problem),
        "eager": Eager(problem),
        "compile": torch.compile(Eager(problem), dynamic=False),
        **{name: make(problem, device) for name, make in OTHERS.items()},
    }
    steps: dict[str, Callable[[], object]] = {
        name: _step(module.to(device), x, residual, dy) for name, module in modules.items() if module is not None
    }
    target = torch.empty_like(dy)
    return steps | {"copy": lambda: target.copy_(dy)}


def _step(module: nn.Module, x: Tensor, residual: Tensor | None, dy: Tensor) -> Callable[[], object]:
    arguments = (x,) if residual is None else (x, residual)
    wanted = (*arguments, *module.parameters())
    return lambda: torch.autograd.grad(module(*arguments), wanted, dy)
