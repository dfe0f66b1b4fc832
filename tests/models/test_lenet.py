from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bnkit import models
from bnkit._checks import UserError
from bnkit.models._lenet_parts import CONNECTIONS, class_codes


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


def test_the_published_network_has_60_000_parameters() -> None:
    """LeCun et al. 1998, section II-B: 156, 12, 1,516, 32, 48,120 and 10,164; the RBF's 840 are fixed."""
    model = models.create("lenet5_1998", "none", num_classes=10, in_channels=1)
    counts = [sum(p.numel() for p in layer.parameters()) for layer in model.get_submodule("features")]
    assert [count for count in counts if count] == [156, 12, 1516, 32, 48_120, 10_164]
    assert sum(p.numel() for p in model.parameters()) == 60_000
    assert [tuple(b.shape) for b in model.get_submodule("classifier").buffers()] == [(10, 84)]


@pytest.mark.parametrize("image_size", [28, 32])
def test_the_published_network_by_hand(image_size: int) -> None:
    torch.manual_seed(0)
    model = models.create("lenet5_1998", "none", num_classes=10, in_channels=1, image_size=image_size)
    features = model.get_submodule("features")
    c1, s2, c3, s4, c5, f6 = (layer for layer in features if list(layer.parameters()))
    for layer in (s2, s4):
        nn.init.uniform_(layer.weight)
        nn.init.uniform_(layer.bias)
    x = torch.randn(3, 1, image_size, image_size)

    def squash(a: torch.Tensor) -> torch.Tensor:
        return 1.7159 * torch.tanh(2 / 3 * a)

    def subsample(y: torch.Tensor, layer: nn.Module) -> torch.Tensor:
        total = y[..., ::2, ::2] + y[..., 1::2, ::2] + y[..., ::2, 1::2] + y[..., 1::2, 1::2]
        return squash(total / 4 * layer.weight[:, None, None] + layer.bias[:, None, None])

    def third(y: torch.Tensor) -> torch.Tensor:
        maps, used = [], 0
        for i, inputs in enumerate(CONNECTIONS):
            own = c3.weight[used : used + len(inputs)]
            used += len(inputs)
            maps.append(F.conv2d(y[:, list(inputs)], own[None], c3.bias[i : i + 1]))
        assert used == 60
        return squash(torch.cat(maps, 1))

    y = F.pad(x, (2, 2, 2, 2)) if image_size == 28 else x
    y = subsample(squash(F.conv2d(y, c1.weight, c1.bias)), s2)
    y = subsample(third(y), s4).flatten(1)
    y = squash(F.linear(squash(F.linear(y, c5.weight, c5.bias)), f6.weight, f6.bias))
    distances = torch.stack([((y - code) ** 2).sum(1) for code in model.get_submodule("classifier").codes], 1)
    torch.testing.assert_close(model(x), -distances, rtol=1e-4, atol=1e-4)


def test_the_connection_table() -> None:
    """Table I: the first six maps see three contiguous ones, the next six four, three see four with a gap, one all."""
    assert CONNECTIONS[:6] == tuple(tuple(sorted({i, (i + 1) % 6, (i + 2) % 6})) for i in range(6))
    assert CONNECTIONS[6:12] == tuple(tuple(sorted((i + k) % 6 for k in range(4))) for i in range(6))
    assert CONNECTIONS[12:15] == tuple(tuple(sorted((i + k) % 6 for k in (0, 1, 3, 4))) for i in (0, 1, 2))
    assert CONNECTIONS[15] == (0, 1, 2, 3, 4, 5)


def test_codes_of_classes_differ_and_stay() -> None:
    for classes in (10, 26):
        codes = class_codes(classes)
        assert codes.shape == (classes, 84)
        assert set(codes.unique().tolist()) == {-1.0, 1.0}
        assert torch.equal(codes, class_codes(classes))
        differing = (codes[:, None] != codes[None]).sum(2) + 84 * torch.eye(classes, dtype=torch.int64)
        assert differing.min() >= 5


def test_the_paper_s_criteria() -> None:
    y = torch.rand(4, 10) * 5
    target = torch.tensor([3, 1, 9, 0])
    own = y[range(4), target]
    torch.testing.assert_close(models.rbf_loss(-y, target), own.mean())
    eq9 = (own + (math.exp(-0.7) + (-y).exp().sum(1)).log()).mean()
    torch.testing.assert_close(models.rbf_loss(-y, target, 0.7), eq9)
    torch.testing.assert_close(models.rbf_loss(-y, target, 1e9), F.cross_entropy(-y, target))


@pytest.mark.parametrize("j", [None, 0.1])
def test_the_published_network_learns_by_the_paper_s_criteria(j: float | None) -> None:
    torch.manual_seed(0)
    model = models.create("lenet5_1998", "none", num_classes=10, in_channels=1)
    x, target = F.interpolate(torch.randn(10, 1, 4, 4), size=(32, 32)), torch.arange(10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.003, momentum=0.9)
    for _ in range(80):
        optimizer.zero_grad()
        models.rbf_loss(model(x), target, j).backward()
        optimizer.step()
    assert (model(x).argmax(1) == target).float().mean() > 0.8


def test_the_published_network_with_a_norm_and_another_output() -> None:
    model = models.create("lenet5_1998", "batch", num_classes=7, in_channels=3, output="linear")
    norms = [layer for layer in model.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    assert [norm.num_features for norm in norms] == [6, 16, 120, 84]
    biased = [type(layer).__name__ for layer in model.modules() if getattr(layer, "bias", None) is not None]
    assert biased == [
        "BatchNorm2d",
        "Subsampling",
        "BatchNorm2d",
        "Subsampling",
        "BatchNorm1d",
        "BatchNorm1d",
        "Linear",
    ]
    assert model(torch.randn(4, 3, 32, 32)).shape == (4, 7)
    with pytest.raises(UserError, match="unknown output 'rbm': did you mean rbf"):
        models.create("lenet5_1998", output="rbm")
    with pytest.raises(UserError, match="lenet5_1998 takes images of 28 or 32 pixels a side, got image_size=30"):
        models.create("lenet5_1998", image_size=30)
