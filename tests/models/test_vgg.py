from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import nn

from bnkit import models
from bnkit._checks import UserError

NAMES = ["vgg11", "vgg13", "vgg16", "vgg19"]


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make()


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def torchvision_s(name: str, **options: float) -> nn.Module:
    return on_meta(lambda: getattr(torchvision.models, name)(init_weights=False, **options))


@pytest.mark.parametrize("suffix", ["", "_bn"])
@pytest.mark.parametrize("name", NAMES)
def test_keys_and_shapes_are_torchvision_s(name: str, suffix: str) -> None:
    ours = on_meta(lambda: models.create(name, "batch" if suffix else "none"))
    assert shapes(ours) == shapes(torchvision_s(name + suffix))


def pair(norm: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """Our vgg11 and torchvision's, empty: drawing 133 million weights of their own would take most of the time."""
    theirs = torchvision_s("vgg11_bn" if norm == "batch" else "vgg11", dropout=0.0)
    ours = on_meta(lambda: models.create("vgg11", norm, dropout=0.0))
    return ours.to(dtype), theirs.to(dtype)


def agree_when_loaded(ours: nn.Module, theirs: nn.Module, x: torch.Tensor, tolerance: float) -> None:
    ours.to_empty(device="cpu")
    theirs.to_empty(device="cpu")
    torch.manual_seed(0)
    for value in theirs.state_dict().values():
        if value.dim() > 1:
            value.normal_(0, (2 / value[0].numel()) ** 0.5)
        elif value.dim() == 1:
            value.uniform_(0.5, 1.5)
        else:
            value.zero_()
    ours.load_state_dict(theirs.state_dict())
    for training in (True, False):
        expected = theirs.train(training)(x)
        assert expected.abs().max() > 0.1
        assert (ours.train(training)(x) - expected).abs().max() <= tolerance * expected.abs().max()
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_torchvision_s_state_gives_torchvision_s_outputs(norm: str) -> None:
    ours, theirs = pair(norm, torch.float32)
    agree_when_loaded(ours, theirs, torch.randn(2, 3, 64, 64), 1e-5)


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_and_to_ten_digits_in_float64(norm: str) -> None:
    # The convolutions only: in float64 the three linear layers take gigabytes.
    ours, theirs = pair(norm, torch.float64)
    agree_when_loaded(
        ours.get_submodule("features"), theirs.get_submodule("features"), torch.randn(2, 3, 64, 64).double(), 1e-10
    )


@pytest.mark.parametrize("in_channels", [1, 3])
@pytest.mark.parametrize("image_size", [17, 28, 32, 64])
def test_small_images_take_the_small_head(image_size: int, in_channels: int) -> None:
    model = models.create("vgg11", "batch", 10, in_channels, image_size=image_size)
    assert model(torch.randn(2, in_channels, image_size, image_size)).shape == (2, 10)
    assert [tuple(p.shape) for p in model.get_submodule("classifier").parameters() if p.dim() == 2] == [
        (512, 512),
        (512, 512),
        (10, 512),
    ]


def test_the_small_head_sees_every_pixel() -> None:
    torch.manual_seed(0)
    model = models.create("vgg11", "none", 10, 1, image_size=28).eval()
    x = torch.randn(1, 1, 28, 28, requires_grad=True)
    model(x).square().sum().backward()
    assert x.grad is not None
    assert (x.grad != 0).float().mean() > 0.9
    assert x.grad[..., -1, :].abs().max() > 0
    assert x.grad[..., :, -1].abs().max() > 0


def test_convolutions_without_the_redundant_bias() -> None:
    model = models.create("vgg11", "batch", image_size=32, conv_bias=False)
    assert all(layer.bias is None for layer in model.modules() if isinstance(layer, nn.Conv2d))


def test_activation_and_placement() -> None:
    model = models.create("vgg11", "batch", image_size=32, activation="tanh", placement="after")
    layers = list(model.get_submodule("features"))
    assert [type(layer).__name__ for layer in layers[:3]] == ["Conv2d", "Tanh", "BatchNorm2d"]
    assert not any(isinstance(layer, nn.ReLU) for layer in model.modules())


def test_errors() -> None:
    with pytest.raises(UserError, match="vgg needs images of 17 pixels a side or more, got image_size=16"):
        models.create("vgg11", image_size=16)
    with pytest.raises(UserError, match=r"dropout must be between 0 and 1, got 1\.5"):
        models.create("vgg11", image_size=32, dropout=1.5)
    with pytest.raises(UserError, match="conv_bias=False needs a norm"):
        models.create("vgg11", "none", image_size=32, conv_bias=False)
    model = on_meta(lambda: models.create("vgg11"))
    assert model(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 1000)
    with pytest.raises(UserError, match="vgg needs images of 32 pixels a side or more, got 31×40"):
        model(torch.empty(2, 3, 31, 40, device="meta"))
