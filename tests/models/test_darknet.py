from __future__ import annotations

import pytest
import timm
import torch
from against import close, draw_state, on_meta, parameters
from torch import nn

from bnkit import models
from bnkit._checks import UserError


def test_published_counts() -> None:
    """Redmon and Farhadi 2018, table 1 and 2: 53 layers, 18.7 billion operations at 256 pixels; timm's parameters."""
    model = on_meta(lambda: models.create("darknet53"))
    layers = [layer for layer in model.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    assert len(layers) == 53
    assert parameters(model) == 41_609_928
    found = models.costs(model, torch.empty(2, 3, 256, 256))  # two images, as an operation is half a multiply-add
    assert found.multiply_adds == pytest.approx(18.7e9, rel=0.01)
    outputs = {layer.name: layer.output for layer in found.layers}
    sides = [outputs[f"stages.{i}.0.conv"] for i in range(5)]
    assert sides == [(2, 64, 128, 128), (2, 128, 64, 64), (2, 256, 32, 32), (2, 512, 16, 16), (2, 1024, 8, 8)]


def test_equals_timm_s_with_its_state() -> None:
    theirs = timm.create_model("darknet53", num_classes=11).double()
    # timm's leaky ReLU has PyTorch's slope, 0.01.
    ours = models.create("darknet53", num_classes=11, activation="leaky_relu").double()
    state = draw_state(theirs)
    ours.load_state_dict(dict(zip(ours.state_dict(), state.values(), strict=True)))
    x = torch.randn(2, 3, 66, 70).double()
    for training in (True, False):
        close(ours.train(training)(x), theirs.train(training)(x), 1e-10)


def test_the_leaky_relu_has_darknet_s_slope() -> None:
    model = on_meta(lambda: models.create("darknet53"))
    assert {layer.negative_slope for layer in model.modules() if isinstance(layer, nn.LeakyReLU)} == {0.1}
    fused = on_meta(lambda: models.create("darknet53", activation="leaky_relu"))
    assert not any(isinstance(layer, nn.LeakyReLU) for layer in fused.modules())


@pytest.mark.parametrize(("image_size", "in_channels"), [(8, 3), (28, 1)])
def test_small_images_keep_their_size_longer(image_size: int, in_channels: int) -> None:
    model = on_meta(lambda: models.create("darknet53", "batch", 10, in_channels, image_size=image_size))
    x = torch.empty(2, in_channels, image_size, image_size, device="meta")
    assert model(x).shape == (2, 10)
    found = {layer.name: layer.output for layer in models.costs(model, x).layers}
    assert found["stages.1.0.conv"] == (2, 128, image_size, image_size)


def test_errors() -> None:
    with pytest.raises(UserError, match="darknet53 needs images of 8 pixels a side or more, got image_size=7"):
        models.create("darknet53", image_size=7)
    with pytest.raises(UserError, match="darknet53 needs images of 32 pixels a side or more, got 31×32"):
        on_meta(lambda: models.create("darknet53"))(torch.empty(1, 3, 31, 32, device="meta"))
