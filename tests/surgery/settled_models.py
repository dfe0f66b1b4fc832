"""Models whose batch norms do something."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def settled(model: nn.Module, seed: int) -> Any:
    """In float64 and eval mode, with random statistics and affine parameters."""
    torch.manual_seed(seed)
    norms: list[Any] = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        for tensor in (norm.weight, norm.running_var):
            tensor.data.uniform_(0.5, 1.5)
        for tensor in (norm.bias, norm.running_mean):
            tensor.data.normal_()
    return model.double().eval()
