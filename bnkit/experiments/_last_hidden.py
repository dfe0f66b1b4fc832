"""The inputs of a network's last hidden activation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import functional
from ..data import ImageSet
from ._record import PERCENTILES


@dataclass(frozen=True)
class LastHidden:
    """Measures what enters the activation behind the last linear layer but one, after its norm if it has one."""

    model: nn.Module
    site: nn.Module
    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, model: nn.Module, data: ImageSet, normalize: str) -> LastHidden | None:
        """None where a network has fewer than two linear layers, and so no hidden vector."""
        modules = [module for module in model.modules() if not list(module.children())]
        linears = [i for i, module in enumerate(modules) if isinstance(module, nn.Linear)]
        if len(linears) < 2:
            return None
        behind = modules[linears[-2] + 1]
        site = behind if isinstance(behind, (_BatchNorm, nn.GroupNorm, nn.LayerNorm)) else modules[linears[-2]]
        channels = data.shape[0]
        mean = data.mean if normalize == "channel" else torch.zeros(channels)
        std = data.std.clamp_min(1e-12) if normalize == "channel" else torch.ones(channels)
        return cls(model, site, mean.view(-1, 1, 1), std.view(-1, 1, 1))

    @torch.no_grad()
    def percentiles(self, images: Tensor) -> np.ndarray:
        """The 15th, 50th and 85th percentile of each unit over uint8 `images`, in evaluation mode, (unit, 3)."""
        seen: list[Tensor] = []
        handle = self.site.register_forward_hook(lambda site, args, output: seen.append(_value(site, args[0], output)))
        training = [module for module in self.model.modules() if module.training]
        parameter = next(self.model.parameters())
        x = ((images.float() / 255 - self.mean) / self.std).to(parameter)
        self.model.eval()
        try:
            self.model(x)
        finally:
            handle.remove()
            for module in training:
                module.training = True
        z = seen[0].float().cpu().numpy()
        ranks = [round(p * (len(z) - 1)) for p in PERCENTILES]
        return np.partition(z, ranks, axis=0)[ranks].T


def _value(site: nn.Module, x: Tensor, output: Tensor) -> Tensor:
    """What enters the activation; a batch-normalization layer may have applied it already."""
    if isinstance(site, _BatchNorm):
        return functional.batch_norm(x, site.running_mean, site.running_var, site.weight, site.bias, eps=site.eps)
    return output
