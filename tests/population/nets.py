"""Small networks and data whose population statistics a test can work out by itself."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def net(norm=nn.BatchNorm2d) -> nn.Sequential:
    """Two batch norms in a row of convolutions, with a dropout that must stay off; all statistics away from 0 and 1."""
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), norm(6), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(6, 5, 3), norm(5), nn.Flatten()
    )
    model.append(nn.Linear(5 * 4 * 4, 7))
    return randomized(model)


def randomized(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                module.num_batches_tracked.fill_(3)
                if module.weight is not None:
                    module.weight.uniform_(0.5, 2)
                    module.bias.normal_()
    return model


def batches(*sizes: int, offset: float = 1.0) -> list[Tensor]:
    return [torch.randn(n, 3, 8, 8) * 2 + offset for n in sizes]


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of each channel, in float64."""
    dims = (0, *range(2, x.dim()))
    return x.double().mean(dims), x.double().var(dims)


def buffers(model: nn.Module) -> list[Tensor]:
    return [b.clone() for b in model.buffers()]


def same(ours: list[Tensor], theirs) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def close(ours: Tensor, true: Tensor, rtol: float = 3e-7) -> None:
    torch.testing.assert_close(ours.double(), true.double(), rtol=rtol, atol=rtol)
