"""Other packages' batch norm with ReLU, where they are installed and take the problem: for `bench_kernels`."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from _kernel_problems import Problem

CUDNN_TYPES = (torch.float32, torch.float16)
"""Of x, beside parameters in float32; in bfloat16 cuDNN's function would have the parameters in bfloat16 too."""
PACKAGES = {"cpu": ("timm",), "cuda": ("timm", "apex", "inplace_abn")}


def missing(device: str) -> list[str]:
    """The packages that would be measured on this device, were they installed."""
    return [package for package in PACKAGES[device] if importlib.util.find_spec(package) is None]


def _timm(problem: Problem, device: str) -> nn.Module | None:
    """timm's batch norm with an in-place ReLU: of images, and without a residual."""
    if len(problem.shape) != 4 or problem.residual or "timm" in missing(device):
        return None
    return importlib.import_module("timm.layers.norm_act").BatchNormAct2d(problem.shape[1])


class CuDNN(nn.BatchNorm2d):
    """cuDNN's batch norm, whichever PyTorch would choose, with PyTorch's add and ReLU."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:  # pyright: ignore
        state = (self.weight, self.bias, self.running_mean, self.running_var)
        y = torch.cudnn_batch_norm(x, *state, True, 0.1, self.eps)[0]
        return F.relu(y if residual is None else y + residual)


def _cudnn(problem: Problem, device: str) -> nn.Module | None:
    takes_it = device == "cuda" and len(problem.shape) == 4 and problem.dtype in CUDNN_TYPES
    return CuDNN(problem.shape[1]) if takes_it else None


class Apex(nn.Module):
    """apex's fused batch norm, add and ReLU of channels_last images in float16, which it takes as (N, H, W, C)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn: Any = importlib.import_module("apex.contrib.groupbn").BatchNorm2d_NHWC(channels, fuse_relu=True)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        z = None if residual is None else residual.movedim(1, -1)
        return self.bn(x.movedim(1, -1), z).movedim(-1, 1)


def _apex(problem: Problem, device: str) -> nn.Module | None:
    if device != "cuda" or "apex" in missing(device):
        return None
    return Apex(problem.shape[1]) if problem.channels_last and problem.dtype is torch.float16 else None


class InPlaceABN(nn.Module):
    """In-Place ABN, with a leaky ReLU since it has no other, of a copy since it overwrites its input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn: Any = importlib.import_module("inplace_abn").InPlaceABN(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x.clone())


def _inplace_abn(problem: Problem, device: str) -> nn.Module | None:
    if device != "cuda" or "inplace_abn" in missing(device):
        return None
    return InPlaceABN(problem.shape[1]) if len(problem.shape) == 4 and not problem.residual else None


OTHERS: dict[str, Callable[[Problem, str], nn.Module | None]] = {
    "timm": _timm,
    "cudnn": _cudnn,
    "apex": _apex,
    "inplace_abn": _inplace_abn,
}
"""What to measure by name; None where the package is missing, or does not take the problem on this device."""
