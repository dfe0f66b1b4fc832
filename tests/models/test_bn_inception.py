from __future__ import annotations

import pytest
import torch
from against import on_meta, parameters
from torch import nn
from torch.nn import functional as F

from bnkit import models
from bnkit._checks import UserError
from bnkit.models._conv_norm import ConvStyle
from bnkit.models.bn_inception import DoubleInception, StridedInception

# Ioffe and Szegedy 2015, figure 5: channels and side of the output of each module.
OUTPUTS = {
    "conv1": (64, 112),
    "maxpool1": (64, 56),
    "conv3": (192, 56),
    "maxpool2": (192, 28),
    "inception3a": (256, 28),
    "inception3b": (320, 28),
    "inception3c": (576, 14),
    "inception4a": (576, 14),
    "inception4b": (576, 14),
    "inception4c": (576, 14),
    "inception4d": (576, 14),
    "inception4e": (1024, 7),
    "inception5a": (1024, 7),
    "inception5b": (1024, 7),
}


def test_sizes_are_those_of_the_paper_s_table() -> None:
    model = on_meta(lambda: models.create("bn_inception"))
    seen = {}
    for name in OUTPUTS:
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: seen.update({name: tuple(output.shape)})
        )
    assert model(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, 1000)
    assert seen == {name: (2, channels, side, side) for name, (channels, side) in OUTPUTS.items()}


def test_parameters_are_tensorflow_s() -> None:
    """The paper's text has 13.6 million, which its table does not make: TensorFlow's own model has as many as ours.

    inception_v2_test.py of TF-slim counts 10,173,112 in the backbone with β and two statistics a channel, no γ, and a
    bias instead of a norm in the separable convolution.
    """
    model = on_meta(lambda: models.create("bn_inception"))
    weights = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 4)
    channels = sum(layer.num_features for layer in model.modules() if isinstance(layer, nn.BatchNorm2d))
    assert weights + 64 + 3 * (channels - 64) == 10_173_112
    assert parameters(model) == weights + 2 * channels + 1024 * 1000 + 1000 == 11_188_288


def test_the_separable_stem() -> None:
    for separable, count in ((True, 8 * 3 * 49 + 24 * 64 + 128), (False, 64 * 3 * 49 + 128)):
        stem = on_meta(lambda separable=separable: models.create("bn_inception", separable_stem=separable))
        assert parameters(stem.get_submodule("conv1")) == count


@pytest.mark.parametrize("pool", ["average", "max"])
def test_a_module_by_hand(pool: str) -> None:
    torch.manual_seed(0)
    module = DoubleInception(6, 2, 3, 4, 2, 3, pool, 5, ConvStyle("none"))
    x = torch.randn(2, 6, 7, 7)
    w = [layer.weight for layer in module.modules() if isinstance(layer, nn.Conv2d)]
    pooled = F.avg_pool2d(x, 3, 1, 1) if pool == "average" else F.max_pool2d(x, 3, 1, 1)
    branches = [
        F.conv2d(x, w[0]),
        F.conv2d(F.conv2d(x, w[1]).relu(), w[2], padding=1),
        F.conv2d(F.conv2d(F.conv2d(x, w[3]).relu(), w[4], padding=1).relu(), w[5], padding=1),
        F.conv2d(pooled, w[6]),
    ]
    torch.testing.assert_close(module(x), torch.cat(branches, 1).relu(), rtol=1e-4, atol=1e-5)


def test_a_strided_module_by_hand() -> None:
    torch.manual_seed(0)
    module = StridedInception(6, 3, 4, 2, 3, ConvStyle("none"))
    x = torch.randn(2, 6, 7, 8)
    w = [layer.weight for layer in module.modules() if isinstance(layer, nn.Conv2d)]
    convolved = [
        F.conv2d(F.conv2d(x, w[0]).relu(), w[1], padding=1, stride=2),
        F.conv2d(F.conv2d(F.conv2d(x, w[2]).relu(), w[3], padding=1).relu(), w[4], padding=1, stride=2),
    ]
    expected = torch.cat([torch.cat(convolved, 1).relu(), F.max_pool2d(x, 3, 2, 1)], 1)
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)


def test_the_recipes_of_section_4_2() -> None:
    recipes = models.BN_INCEPTION_RECIPES
    assert list(recipes) == ["Inception", "BN-Baseline", "BN-x5", "BN-x30", "BN-x5-Sigmoid"]
    rates = [recipe.learning_rate / recipes["Inception"].learning_rate for recipe in recipes.values()]
    assert rates == pytest.approx([1, 1, 5, 30, 5])
    for name, recipe in recipes.items():
        model = on_meta(lambda recipe=recipe: recipe.create(num_classes=10, image_size=32))
        kinds = [type(layer) for layer in model.modules()]
        assert any(issubclass(kind, nn.BatchNorm2d) for kind in kinds) is (name != "Inception")
        assert (nn.LocalResponseNorm in kinds) is (name in ("Inception", "BN-Baseline"))
        dropout = next(layer for layer in model.modules() if isinstance(layer, nn.Dropout))
        assert dropout.p == (0.4 if name in ("Inception", "BN-Baseline") else 0)
        activations = {getattr(layer, "activation", None) for layer in model.modules()} - {None}
        assert activations == ({"sigmoid"} if name == "BN-x5-Sigmoid" else {"relu"} if name != "Inception" else set())
    changed = recipes["BN-x5"]
    assert (changed.weight_decay_factor, changed.decay_speedup) == (1 / 5, 6)
    assert changed.shuffle_within_shards
    assert changed.fewer_distortions


def test_options_go_over_the_recipe_s() -> None:
    model = on_meta(lambda: models.BN_INCEPTION_RECIPES["Inception"].create(10, image_size=32, dropout=0.1))
    assert next(layer.p for layer in model.modules() if isinstance(layer, nn.Dropout)) == 0.1


@pytest.mark.parametrize(("image_size", "in_channels"), [(8, 3), (28, 1), (32, 3)])
def test_small_images_take_the_small_stem(image_size: int, in_channels: int) -> None:
    model = models.create("bn_inception", "batch", 10, in_channels, image_size=image_size)
    x = torch.randn(2, in_channels, image_size, image_size)
    assert model(x).shape == model.eval()(x).shape == (2, 10)


def test_errors() -> None:
    with pytest.raises(UserError, match="bn_inception needs images of 8 pixels a side or more, got image_size=7"):
        models.create("bn_inception", image_size=7)
    with pytest.raises(UserError, match="dropout must be between 0 and 1, got 2"):
        models.create("bn_inception", dropout=2)
    model = on_meta(lambda: models.create("bn_inception"))
    with pytest.raises(UserError, match="bn_inception needs images of 32 pixels a side or more, got 32×31"):
        model(torch.empty(2, 3, 32, 31, device="meta"))
