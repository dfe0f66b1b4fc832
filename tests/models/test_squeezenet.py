from __future__ import annotations

import pytest
import torch
import torchvision
from against import agree, on_meta, parameters, shapes
from torch import nn

from bnkit import models
from bnkit._checks import UserError

NAMES = {"squeezenet1_0": (1_248_424, 21), "squeezenet1_1": (1_235_496, 17)}


@pytest.mark.parametrize("name", NAMES)
def test_keys_and_shapes_are_torchvision_s(name: str) -> None:
    ours = on_meta(lambda: models.create(name, "none"))
    assert shapes(ours) == shapes(on_meta(getattr(torchvision.models, name)))
    assert parameters(ours) == NAMES[name][0]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["32", "64"])
@pytest.mark.parametrize("name", NAMES)
def test_equals_torchvision_s_with_its_state(name: str, dtype: torch.dtype, tolerance: float) -> None:
    theirs = on_meta(lambda: getattr(torchvision.models, name)(dropout=0.0))
    ours = on_meta(lambda: models.create(name, "none", dropout=0.0))
    agree(ours, theirs, torch.randn(2, 3, 67, 80, dtype=dtype), tolerance)


def test_dropout_falls_where_torchvision_s_does() -> None:
    theirs = torchvision.models.squeezenet1_1(num_classes=5)
    ours = models.create("squeezenet1_1", "none", 5)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 65, 65)
    outputs = []
    for model in (ours, theirs):
        torch.manual_seed(4)
        outputs.append(model(x))
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("name", NAMES)
def test_a_norm_follows_each_convolution_but_the_last_and_replaces_its_bias(name: str) -> None:
    model = on_meta(lambda: models.create(name, "batch"))
    *normed, last = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    norms = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert sorted(conv.out_channels for conv in normed) == sorted(norm.num_features for norm in norms)
    assert len(norms) == 25
    assert all(conv.bias is None for conv in normed)
    assert last.bias is not None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("image_size", [8, 28, 32])
def test_small_images_take_the_small_stem(name: str, image_size: int) -> None:
    model = models.create(name, "batch", 10, 1, image_size=image_size)
    x = torch.randn(2, 1, image_size, image_size)
    assert model(x).shape == model.eval()(x).shape == (2, 10)


@pytest.mark.parametrize("name", NAMES)
def test_errors(name: str) -> None:
    with pytest.raises(UserError, match="squeezenet needs images of 8 pixels a side or more, got image_size=7"):
        models.create(name, image_size=7)
    with pytest.raises(UserError, match=r"dropout must be between 0 and 1, got -1"):
        models.create(name, dropout=-1)
    model, smallest = on_meta(lambda: models.create(name)), NAMES[name][1]
    assert model(torch.empty(2, 3, smallest, smallest, device="meta")).shape == (2, 1000)
    with pytest.raises(UserError, match=f"squeezenet needs images of {smallest} pixels a side or more, got"):
        model(torch.empty(2, 3, smallest, smallest - 1, device="meta"))
