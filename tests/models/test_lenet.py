from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bnkit import models
from bnkit._checks import UserError


@pytest.mark.parametrize("image_size", [28, 32])
@pytest.mark.parametrize(("activation", "pool"), [("relu", "max"), ("tanh", "average")])
def test_without_a_norm_by_hand(image_size: int, activation: str, pool: str) -> None:
    torch.manual_seed(0)
    options = {"activation": activation, "pool": pool, "image_size": image_size}
    model = models.create("lenet5", "none", num_classes=10, in_channels=1, **options)
    x = torch.randn(3, 1, image_size, image_size)
    act = getattr(torch, activation)
    down = F.max_pool2d if pool == "max" else F.avg_pool2d
    w, b = ([p for p in model.parameters() if (p.dim() > 1) is weight] for weight in (True, False))
    value = x if image_size == 32 else F.pad(x, (2, 2, 2, 2))
    value = down(act(F.conv2d(value, w[0], b[0])), 2)
    value = down(act(F.conv2d(value, w[1], b[1])), 2).flatten(1)
    value = F.linear(act(F.linear(act(F.linear(value, w[2], b[2])), w[3], b[3])), w[4], b[4])
    torch.testing.assert_close(model(x), value, rtol=1e-4, atol=1e-5)


def test_size() -> None:
    # 156 + 2416 + 48120 + 10164 + 850, LeCun et al. 1998 but for C3's full connection and the linear output.
    model = models.create("lenet5", "none", num_classes=10, in_channels=1)
    assert sum(p.numel() for p in model.parameters()) == 61_706


def test_norms_replace_biases_before_each_activation() -> None:
    model = models.create("lenet5", "batch", num_classes=10, in_channels=1)
    norms = [layer for layer in model.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    assert [norm.num_features for norm in norms] == [6, 16, 120, 84]
    assert [name for name, p in model.named_parameters() if name.endswith("bias") and p.dim() == 1] == [
        "features.1.bias",
        "features.5.bias",
        "classifier.1.bias",
        "classifier.4.bias",
        "classifier.6.bias",
    ]


def test_errors() -> None:
    with pytest.raises(UserError, match="lenet5 takes images of 28 or 32 pixels a side, got image_size=64"):
        models.create("lenet5", image_size=64)
    with pytest.raises(UserError, match=r"unknown pool 'mean': did you mean max\?"):
        models.create("lenet5", pool="mean")
