from __future__ import annotations

import pytest
import torch
from against import on_meta, parameters
from torch import nn
from torch.nn import functional as F

from bnkit import models
from bnkit._checks import UserError


def test_the_paper_s_network() -> None:
    """Ronneberger et al. 2015, figure 1: 572 pixels make 388; 23 convolutional layers (section 2)."""
    model = on_meta(lambda: models.create("unet", "none", 2, 1, padded=False))
    assert model(torch.empty(1, 1, 572, 572, device="meta")).shape == (1, 2, 388, 388)
    layers = [layer for layer in model.modules() if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d))]
    assert len(layers) == 23
    assert max(layer.out_channels for layer in layers) == 1024
    assert parameters(model) == by_hand(width=64, depth=4, in_channels=1, num_classes=2) == 31_030_658


def by_hand(width: int, depth: int, in_channels: int, num_classes: int) -> int:
    def stage(into: int, out: int) -> int:
        return 9 * into * out + out + 9 * out * out + out

    widths = [width * 2**i for i in range(depth + 1)]
    down = sum(stage(into, out) for into, out in zip([in_channels, *widths], widths, strict=False))
    up = sum(stage(2 * w, w) + 4 * 2 * w * w + w for w in widths[:-1])
    return down + up + width * num_classes + num_classes


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_any_depth(depth: int) -> None:
    model = models.create("unet", "none", 3, 2, depth=depth, width=4, image_size=32)
    assert parameters(model) == by_hand(width=4, depth=depth, in_channels=2, num_classes=3)
    assert model(torch.randn(2, 2, 32, 40)).shape == (2, 3, 32, 40)


@pytest.mark.parametrize(
    ("padded", "size"),
    # Without padding 46 is 17 more than the smallest; of 21 and 35, rows and columns are lost at different depths.
    [(True, (16, 24)), (True, (21, 35)), (False, (64, 46))],
)
def test_by_hand(padded: bool, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model = models.create("unet", "none", 3, 2, depth=2, width=3, padded=padded, image_size=64)
    w = [layer.weight for layer in model.get_submodule("down").modules() if isinstance(layer, nn.Conv2d)]
    w += [layer.weight for layer in model.get_submodule("bottom").modules() if isinstance(layer, nn.Conv2d)]
    up = [layer.weight for layer in model.get_submodule("up").modules() if isinstance(layer, nn.Conv2d)]
    grow = [
        layer.weight for layer in model.get_submodule("upsample").modules() if isinstance(layer, nn.ConvTranspose2d)
    ]
    x = torch.randn(2, 2, *size)

    def twice(y: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        padding = 1 if padded else 0
        return F.conv2d(F.conv2d(y, first, padding=padding).relu(), second, padding=padding).relu()

    def join(before: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if not padded:
            top, left = (before.shape[-2] - y.shape[-2]) // 2, (before.shape[-1] - y.shape[-1]) // 2
            return torch.cat([before[..., top : top + y.shape[-2], left : left + y.shape[-1]], y], 1)
        whole = torch.zeros(*y.shape[:2], *before.shape[2:])
        whole[..., : y.shape[-2], : y.shape[-1]] = y
        return torch.cat([before, whole], 1)

    first = twice(x, w[0], w[1])
    second = twice(F.max_pool2d(first, 2), w[2], w[3])
    y = twice(F.max_pool2d(second, 2), w[4], w[5])
    y = twice(join(second, F.conv_transpose2d(y, grow[0], stride=2)), up[0], up[1])
    y = twice(join(first, F.conv_transpose2d(y, grow[1], stride=2)), up[2], up[3])
    expected = F.conv2d(y, model.get_parameter("classifier.weight"))
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", ["none", "batch", "group"])
def test_with_and_without_norm(norm: str) -> None:
    model = models.create("unet", norm, 3, 1, depth=2, width=4, image_size=28)
    convolutions = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    assert all((layer.bias is not None) is (norm == "none") for layer in convolutions[:-1])
    norms = [layer for layer in model.modules() if isinstance(layer, (nn.BatchNorm2d, nn.GroupNorm))]
    assert len(norms) == (0 if norm == "none" else 10)
    x = torch.randn(2, 1, 28, 28)
    F.cross_entropy(model(x), torch.randint(0, 3, (2, 28, 28))).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_traces_at_odd_sizes() -> None:
    model = models.create("unet", "batch", 3, 1, depth=2, width=4, image_size=28).eval()
    traced = torch.fx.symbolic_trace(model)
    for size in (16, 21):
        x = torch.randn(2, 1, size, size + 3)
        assert torch.equal(traced(x), model(x))


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("padded", [True, False])
def test_the_smallest_image(depth: int, padded: bool) -> None:
    make = {"depth": depth, "width": 2, "padded": padded}
    model = on_meta(lambda: models.create("unet", "none", 3, 1, **make))
    smallest = {1: 18, 2: 44, 3: 92, 4: 188}[depth] if not padded else 2**depth
    output = model(torch.empty(1, 1, smallest, smallest, device="meta"))
    assert output.shape[-1] >= 1
    with pytest.raises(UserError, match=f"unet needs images of {smallest} pixels a side or more, got"):
        model(torch.empty(1, 1, smallest, smallest - 1, device="meta"))
    with pytest.raises(UserError, match=f"a unet of depth {depth} needs images of {smallest} pixels a side"):
        models.create("unet", image_size=smallest - 1, **make)


def test_errors() -> None:
    with pytest.raises(UserError, match="depth must be a positive integer, got 0"):
        models.create("unet", depth=0)
    with pytest.raises(UserError, match=r"width must be a positive integer, got 1\.5"):
        models.create("unet", width=1.5)
    with pytest.raises(UserError, match="dropout must be between 0 and 1, got -1"):
        models.create("unet", dropout=-1)
