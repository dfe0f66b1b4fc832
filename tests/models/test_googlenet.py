from __future__ import annotations

import pytest
import torch
import torchvision
from against import agree, draw_state, on_meta, parameters, shapes
from torch import nn
from torch.nn import functional as F

from bnkit import models
from bnkit._checks import UserError
from bnkit.models._conv_norm import ConvStyle


def theirs(**options: float) -> nn.Module:
    return on_meta(lambda: torchvision.models.googlenet(init_weights=False, **options))


@pytest.mark.parametrize("aux_logits", [False, True])
def test_keys_and_shapes_are_torchvision_s(aux_logits: bool) -> None:
    ours = on_meta(lambda: models.create("googlenet", aux_logits=aux_logits))
    assert shapes(ours) == shapes(theirs(aux_logits=aux_logits))
    assert parameters(ours) == (13_004_888 if aux_logits else 6_624_904)


def test_equals_torchvision_s_with_its_state() -> None:
    ours = on_meta(lambda: models.create("googlenet", dropout=0.0))
    agree(ours, theirs(aux_logits=False, dropout=0.0), torch.randn(4, 3, 97, 80).double(), 1e-10)


def test_equals_torchvision_s_in_float32() -> None:
    reference = theirs(aux_logits=False, dropout=0.0, num_classes=50).to_empty(device="cpu")
    ours = models.create("googlenet", num_classes=50, dropout=0.0)
    ours.load_state_dict(draw_state(reference))
    x = torch.randn(2, 3, 160, 160)
    for training in (True, False):
        expected = reference.train(training)(x)
        assert (ours.train(training)(x) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("transform_input", [False, True])
def test_auxiliary_heads_equal_torchvision_s(transform_input: bool) -> None:
    options = {"aux_logits": True, "transform_input": transform_input}
    reference = theirs(num_classes=6, **options).double().to_empty(device="cpu")
    ours = models.create("googlenet", "batch", 6, **options).double()
    ours.load_state_dict(draw_state(reference))
    x = torch.randn(3, 3, 65, 65).double()
    found = []
    for model in (ours, reference):
        torch.manual_seed(3)  # of the dropouts
        found.append(model(x))
    for name in ("logits", "aux_logits2", "aux_logits1"):
        torch.testing.assert_close(getattr(found[0], name), getattr(found[1], name), rtol=1e-10, atol=1e-10)
    assert found[0]._fields == ("logits", "aux_logits2", "aux_logits1")
    torch.testing.assert_close(ours.eval()(x), reference.eval()(x), rtol=1e-10, atol=1e-10)


def test_weights_with_auxiliary_heads_load_into_a_network_without() -> None:
    with_heads = models.create("googlenet", "none", 4, aux_logits=True, image_size=32)
    without = models.create("googlenet", "none", 4, image_size=32)
    state = with_heads.state_dict()
    assert without.load_state_dict(state) == ([], [])
    assert "aux1.fc1.weight" in state
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(without.eval()(x), with_heads.eval()(x))


def test_the_paper_s_table() -> None:
    """Szegedy et al. 2015, table 1: multiply-adds of each module."""
    model = on_meta(lambda: models.create("inception_v1", "none"))
    millions = {"3a": 128, "3b": 304, "4a": 73, "4b": 88, "4c": 100, "4d": 119, "4e": 170, "5a": 54, "5b": 71}
    found = models.costs(model, torch.empty(2, 3, 224, 224))
    for name, published in millions.items():
        own = sum(layer.multiply_adds for layer in found.layers if layer.name.startswith(f"inception{name}."))
        # The widths of 5a make 51 million; the table's parameters, too, are up to 9% off from its widths.
        assert own / 2e6 == pytest.approx(51 if name == "5a" else published, rel=0.01)
    # "Around 6.8 million" in the table's sum, 1.5 billion multiply-adds in section 1.
    assert parameters(model) == 6_998_552
    assert found.multiply_adds / 2 == pytest.approx(1.5e9, rel=0.06)


def test_a_module_by_hand() -> None:
    torch.manual_seed(0)
    module = models.Inception(6, (2, 3, 4, 2, 3, 5), ConvStyle("none"))
    x = torch.randn(2, 6, 7, 7)
    w = [layer.weight for layer in module.modules() if isinstance(layer, nn.Conv2d)]
    assert [tuple(weight.shape[2:]) for weight in w] == [(1, 1), (1, 1), (3, 3), (1, 1), (5, 5), (1, 1)]
    branches = [
        F.conv2d(x, w[0]),
        F.conv2d(F.conv2d(x, w[1]).relu(), w[2], padding=1),
        F.conv2d(F.conv2d(x, w[3]).relu(), w[4], padding=2),
        F.conv2d(F.max_pool2d(x, 3, 1, 1), w[5]),
    ]
    torch.testing.assert_close(module(x), torch.cat(branches, 1).relu(), rtol=1e-4, atol=1e-5)


def test_a_naive_module_by_hand() -> None:
    torch.manual_seed(0)
    module = models.NaiveInception(6, (2, 0, 4, 0, 3, 0), ConvStyle("none"))
    x = torch.randn(2, 6, 7, 7)
    w = [layer.weight for layer in module.modules() if isinstance(layer, nn.Conv2d)]
    convolved = [F.conv2d(x, weight, padding=weight.shape[-1] // 2).relu() for weight in w]
    expected = torch.cat([*convolved, F.max_pool2d(x, 3, 1, 1)], 1)
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)
    assert module.out_channels == expected.shape[1] == 15


def test_naive_modules_grow_from_stage_to_stage() -> None:
    model = on_meta(lambda: models.create("inception_v1", "none", naive=True))
    assert model.get_submodule("inception5b").out_channels == 4944
    assert parameters(model) == 97_526_008
    assert model(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, 1000)


def test_response_normalization_gives_way_to_another_norm() -> None:
    for norm, count in (("none", 2), ("batch", 0)):
        model = on_meta(lambda norm=norm: models.create("inception_v1", norm))
        assert sum(isinstance(layer, nn.LocalResponseNorm) for layer in model.modules()) == count


def test_a_norm_replaces_the_bias() -> None:
    for norm, bias in (("none", True), ("group", False)):
        model = on_meta(lambda norm=norm: models.create("googlenet", norm, aux_logits=True))
        convolutions = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]
        assert len(convolutions) == 3 + 9 * 6 + 2
        assert all((layer.bias is not None) is bias for layer in convolutions)


@pytest.mark.parametrize("name", ["googlenet", "inception_v1", "bn_inception"])
def test_reductions_of_the_channels_do_not_blow_up_the_logits(name: str) -> None:
    torch.manual_seed(0)
    model = models.create(name, "none", 10, image_size=32).eval()
    assert 0.05 < model(torch.randn(4, 3, 32, 32)).std() < 5


@pytest.mark.parametrize("in_channels", [1, 3])
@pytest.mark.parametrize("image_size", [4, 28, 32])
def test_small_images_take_the_small_stem(image_size: int, in_channels: int) -> None:
    model = models.create("googlenet", "batch", 10, in_channels, image_size=image_size, aux_logits=True)
    x = torch.randn(2, in_channels, image_size, image_size)
    assert [logits.shape for logits in model(x)] == [(2, 10)] * 3
    assert model.eval()(x).shape == (2, 10)


def test_errors() -> None:
    with pytest.raises(UserError, match="googlenet needs images of 4 pixels a side or more, got image_size=3"):
        models.create("googlenet", image_size=3)
    with pytest.raises(UserError, match="large_kernel must be odd, got 4"):
        models.create("googlenet", large_kernel=4)
    with pytest.raises(UserError, match="dropout must be between 0 and 1, got 7"):
        models.create("googlenet", dropout_aux=7)
    with pytest.raises(UserError, match="transform_input is for images of 3 channels"):
        models.create("googlenet", in_channels=1, transform_input=True)
    model = on_meta(lambda: models.create("googlenet"))
    assert model(torch.empty(2, 3, 15, 15, device="meta")).shape == (2, 1000)
    with pytest.raises(UserError, match="googlenet needs images of 15 pixels a side or more, got 14×15"):
        model(torch.empty(2, 3, 14, 15, device="meta"))
