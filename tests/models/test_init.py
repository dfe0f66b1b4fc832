from __future__ import annotations

import pytest
import torch

from bnkit._checks import UserError
from bnkit.models._init import conv2d, conv_transpose2d, initializer, linear, output_layer


def drawn(init: str | float, *shape: int) -> torch.Tensor:
    torch.manual_seed(0)
    return initializer(init)(torch.empty(shape))


@pytest.mark.parametrize(
    ("init", "shape", "std"),
    [
        ("small-gaussian", (300, 400), 0.01),
        (0.3, (300, 400), 0.3),
        (2, (300, 400), 2.0),
        ("xavier", (300, 400), (2 / 700) ** 0.5),
        ("kaiming", (300, 400), (2 / 400) ** 0.5),
        ("kaiming", (64, 100, 3, 3), (2 / (64 * 9)) ** 0.5),
        ("lecun", (300, 400), 2.4 / 400 / 3**0.5),
        ("torch", (300, 400), (1 / 400 / 3) ** 0.5),
        ("torch", (64, 100, 3, 3), (1 / 900 / 3) ** 0.5),
        ("lecun", (64, 100, 3, 3), 2.4 / 900 / 3**0.5),
    ],
)
def test_scales_are_those_published(init: str | float, shape: tuple[int, ...], std: float) -> None:
    weight = drawn(init, *shape)
    assert weight.std().item() == pytest.approx(std, rel=0.02)
    assert abs(weight.mean().item()) < 0.02 * std


def test_uniform_bounds() -> None:
    assert drawn("lecun", 300, 400).abs().max().item() == pytest.approx(2.4 / 400, rel=1e-3)
    assert drawn("xavier", 300, 400).abs().max().item() == pytest.approx((6 / 700) ** 0.5, rel=1e-3)


def test_a_bias_is_zero_and_draws_nothing() -> None:
    rests = []
    for bias in (False, True):
        torch.manual_seed(3)
        layers = [linear(5, 4, bias=bias, init="xavier"), conv2d(2, 3, 3, padding=1, bias=bias, init="lecun")]
        rests.append(torch.cat([*(layer.weight.flatten() for layer in layers), torch.rand(1)]))
        for layer in layers:
            assert (layer.bias is not None) is bias
            assert layer.bias is None or torch.equal(layer.bias, torch.zeros_like(layer.bias))
    assert torch.equal(*rests)


def test_the_form_of_a_convolution() -> None:
    layer = conv2d(4, 6, (1, 3), stride=(2, 1), padding=(0, 2), dilation=(1, 2), groups=2, bias=False, init="kaiming")
    assert layer.weight.shape == (6, 2, 1, 3)
    assert layer(torch.randn(1, 4, 8, 8)).shape == (1, 6, 4, 8)
    layer = conv_transpose2d(4, 6, 2, stride=2, bias=True, init="xavier")
    assert layer(torch.randn(1, 4, 8, 8)).shape == (1, 6, 16, 16)
    assert layer.bias is not None
    assert layer.bias.eq(0).all()


def test_the_output_layer_is_not_drawn_for_a_relu() -> None:
    assert output_layer(400, 300, "kaiming").weight.abs().max().item() == pytest.approx(1 / 20, rel=1e-3)
    assert output_layer(400, 300, 0.3).weight.std().item() == pytest.approx(0.3, rel=0.02)


def test_errors() -> None:
    with pytest.raises(UserError, match=r"unknown init 'xavir': did you mean xavier\?"):
        initializer("xavir")
    for scale in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match="scale of the initial weights must be positive"):
            initializer(scale)
    with pytest.raises(UserError, match="init must be a name or a number, got True"):
        initializer(True)
