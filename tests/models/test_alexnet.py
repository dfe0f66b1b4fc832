from __future__ import annotations

import pytest
import torch
import torchvision
from against import agree, on_meta, parameters, shapes
from torch import nn

from bnkit import models
from bnkit._checks import UserError


def theirs(dropout: float = 0.0) -> nn.Module:
    return on_meta(lambda: torchvision.models.alexnet(dropout=dropout))


def test_keys_and_shapes_are_torchvision_s() -> None:
    ours = on_meta(lambda: models.create("alexnet", "none"))
    assert shapes(ours) == shapes(theirs())
    assert parameters(ours) == 61_100_840


def test_equals_torchvision_s_with_its_state() -> None:
    agree(on_meta(lambda: models.create("alexnet", "none", dropout=0.0)), theirs(), torch.randn(2, 3, 95, 80), 1e-5)


def test_and_to_ten_digits_in_float64() -> None:
    # The convolutions only: in float64 the linear layers take gigabytes.
    ours = on_meta(lambda: models.create("alexnet", "none")).get_submodule("features")
    agree(ours, theirs().get_submodule("features"), torch.randn(2, 3, 95, 80).double(), 1e-10)


def test_dropout_falls_where_torchvision_s_does() -> None:
    x = torch.randn(3, 256 * 6 * 6)
    outputs = []
    for model in (on_meta(lambda: models.create("alexnet", "none")), theirs(0.5)):
        classifier = model.get_submodule("classifier").to_empty(device="cpu")
        with torch.no_grad():
            for parameter in classifier.parameters():
                parameter.fill_(1e-4)
        torch.manual_seed(1)
        outputs.append(classifier(x))
    torch.testing.assert_close(*outputs)


def test_a_norm_follows_each_convolution_and_replaces_its_bias() -> None:
    model = on_meta(lambda: models.create("alexnet", "batch"))
    layers = list(model.get_submodule("features"))
    convolutions = [i for i, layer in enumerate(layers) if isinstance(layer, nn.Conv2d)]
    assert [layers[i + 1].num_features for i in convolutions] == [64, 192, 384, 256, 256]
    assert all(layers[i].bias is None for i in convolutions)
    after = list(on_meta(lambda: models.create("alexnet", "batch", placement="after")).get_submodule("features"))
    assert isinstance(after[1], nn.ReLU)
    assert isinstance(after[2], nn.BatchNorm2d)
    assert after[0].bias is not None


@pytest.mark.parametrize("in_channels", [1, 3])
@pytest.mark.parametrize("image_size", [15, 28, 32, 64])
def test_small_images_take_the_small_stem_and_head(image_size: int, in_channels: int) -> None:
    model = models.create("alexnet", "batch", 10, in_channels, image_size=image_size)
    x = torch.randn(2, in_channels, image_size, image_size)
    assert model(x).shape == model.eval()(x).shape == (2, 10)
    assert parameters(model) < 3_000_000


def test_errors() -> None:
    with pytest.raises(UserError, match="alexnet needs images of 15 pixels a side or more, got image_size=14"):
        models.create("alexnet", image_size=14)
    with pytest.raises(UserError, match=r"dropout must be between 0 and 1, got 1\.5"):
        models.create("alexnet", dropout=1.5)
    with pytest.raises(UserError, match=r"unknown placement 'behind'"):
        models.create("alexnet", placement="behind")
    model = on_meta(lambda: models.create("alexnet"))
    assert model(torch.empty(2, 3, 63, 63, device="meta")).shape == (2, 1000)
    with pytest.raises(UserError, match="alexnet needs images of 63 pixels a side or more, got 62×80"):
        model(torch.empty(2, 3, 62, 80, device="meta"))
