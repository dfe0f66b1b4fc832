from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import bnkit.nn
from bnkit import models
from bnkit._checks import UserError
from bnkit.models._activation import activation_layer
from bnkit.models._norm import has_bias, norm_add, norm_and_activation, norm_layer, norm_layers
from bnkit.nn import ACTIVATION_MODULES, Fused
from bnkit.ops import ACTIVATIONS


def normalized(norm: models.Norm, x: torch.Tensor, activation: str = "tanh") -> torch.Tensor:
    layers = norm_layers(norm, x.shape[1], dims=1 if x.dim() == 2 else 2, activation=activation)
    return nn.Sequential(*layers)(x)


VECTORS = torch.randn(6, 32, generator=torch.Generator().manual_seed(0)) * 3 + 5
MAPS = torch.randn(4, 6, 5, 5, generator=torch.Generator().manual_seed(0)) * 3 + 5


@pytest.mark.parametrize("x", [VECTORS, MAPS], ids=["vectors", "maps"])
def test_each_norm_by_value(x: torch.Tensor) -> None:
    over = [0, *range(2, x.dim())]
    batch = (x - x.mean(over, keepdim=True)) / (x.var(over, correction=0, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(normalized("batch", x), batch.tanh(), rtol=1e-5, atol=1e-5)
    layer = F.layer_norm(x, x.shape[1:])
    torch.testing.assert_close(normalized("layer", x), layer.tanh(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(normalized("none", x), x.tanh())


def test_instance_norm_by_value() -> None:
    expected = (MAPS - MAPS.mean((2, 3), keepdim=True)) / (MAPS.var((2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(normalized("instance", MAPS), expected.tanh(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("dims", "features", "groups"),
    [(2, 512, 32), (2, 64, 32), (2, 32, 16), (2, 6, 3), (2, 7, 1), (2, 1, 1), (1, 100, 5), (1, 512, 32), (1, 16, 1)],
)
def test_no_group_is_too_small_to_normalize(dims: int, features: int, groups: int) -> None:
    layer = norm_layers("group", features, dims=dims, activation="relu")[0]
    assert isinstance(layer, nn.GroupNorm)
    assert layer.num_groups == groups


@pytest.mark.parametrize(("dims", "kind"), [(1, bnkit.nn.BatchNorm1d), (2, bnkit.nn.BatchNorm2d)])
def test_batch_norm_applies_the_activation_itself(dims: int, kind: type[nn.Module]) -> None:
    norm, placeholder = norm_layers("batch", 4, dims=dims, activation="relu")
    assert type(norm) is kind
    assert norm.activation == "relu"
    assert type(placeholder) is Fused


def test_a_function_makes_the_norm() -> None:
    norm, activation = norm_layers(lambda n: nn.BatchNorm2d(n, eps=0.5), 4, dims=2, activation="relu")
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.eps == 0.5
    assert type(activation) is nn.ReLU


@pytest.mark.parametrize(("name", "eps"), [("unet", 1e-5), ("googlenet", 1e-3), ("darknet53", 1e-5)])
def test_only_a_named_norm_gets_the_network_s_eps(name: str, eps: float) -> None:
    for norm, expected in (("batch", eps), (lambda n: nn.BatchNorm2d(n, eps=0.5), 0.5)):
        with torch.device("meta"):
            model = models.create(name, norm)
        assert {layer.eps for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)} == {expected}


def test_the_names_are_those_that_batch_norm_fuses() -> None:
    assert set(ACTIVATION_MODULES) == set(ACTIVATIONS)
    x = torch.linspace(-3, 3, 24).view(6, 4)
    for name in ACTIVATIONS:
        fused = bnkit.nn.BatchNorm1d(4, activation=name)
        torch.testing.assert_close(fused(x), activation_layer(name)(bnkit.nn.BatchNorm1d(4)(x)))


def test_a_function_that_makes_a_layer_of_bnkit_gets_the_activation_too() -> None:
    norm, placeholder = norm_layers(lambda n: bnkit.nn.BatchNorm2d(n, eps=0.5), 4, activation="tanh")
    assert isinstance(norm, bnkit.nn.BatchNorm2d)
    assert (norm.activation, type(placeholder)) == ("tanh", Fused)
    norm, activation = norm_layers(lambda n: bnkit.nn.BatchNorm2d(n, activation="silu"), 4, activation="tanh")
    assert (norm.activation, type(activation)) == ("silu", nn.Tanh)


@pytest.mark.parametrize("kind", ["sync", "ghost", "frozen", "renorm"])
@pytest.mark.parametrize("dims", [1, 2])
def test_relatives_of_batch_norm_fuse_the_activation(kind: str, dims: int) -> None:
    norm, placeholder = norm_layers(kind, 4, dims=dims, activation="relu")
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
    assert norm.activation == "relu"
    assert type(placeholder) is Fused
    assert nn.Sequential(norm, placeholder)(torch.randn(4, 4, *[3, 3][: 2 * (dims - 1)])).min() == 0


def test_after_the_activation() -> None:
    for norm in ("batch", "group", nn.BatchNorm2d):
        activation, layer = norm_layers(norm, 6, activation="relu", placement="after")
        assert type(activation) is nn.ReLU
        torch.testing.assert_close(nn.Sequential(activation, layer)(MAPS), norm_layer(norm, 6)(MAPS.relu()))
    assert [type(layer) for layer in norm_layers("none", 6, placement="after")] == [nn.ReLU]
    with pytest.raises(UserError, match=r"unknown placement 'afterwards': did you mean after\?"):
        norm_layers("batch", 6, placement="afterwards")


def test_a_bias_is_needed_where_no_norm_follows_at_once() -> None:
    assert [has_bias("none"), has_bias("batch"), has_bias("batch", "after")] == [True, False, True]


@pytest.mark.parametrize("activation", ["relu", "tanh", nn.ELU])
@pytest.mark.parametrize("norm", ["none", "batch", "group", "layer", "instance", nn.BatchNorm2d])
def test_norm_add(norm: models.Norm, activation: str) -> None:
    pair = norm_and_activation(norm, 6, activation=activation)
    residual = torch.randn_like(MAPS)
    expected = activation_layer(activation)(norm_layer(norm, 6)(MAPS) + residual)
    torch.testing.assert_close(norm_add(*pair, MAPS, residual), expected)
    expected = activation_layer(activation)(norm_layer(norm, 6)(MAPS))
    torch.testing.assert_close(norm_add(*pair, MAPS, None), expected)


def test_an_activation_that_is_a_function() -> None:
    norm, activation = norm_layers("batch", 4, activation=lambda: nn.LeakyReLU(0.1))
    assert norm.activation is None
    assert isinstance(activation, nn.LeakyReLU)
    with pytest.raises(UserError, match=r"activation must give a torch.nn.Module, got str"):
        norm_layers("batch", 4, activation=lambda: "relu")  # pyright: ignore[reportArgumentType]


def test_errors() -> None:
    with pytest.raises(UserError, match=r"unknown norm 'bath': did you mean batch\?"):
        norm_layers("bath", 4, dims=2, activation="relu")
    for norm in ("none", "batch", nn.BatchNorm2d):
        with pytest.raises(UserError, match=r"unknown activation 'rellu': did you mean relu"):
            norm_layers(norm, 4, dims=2, activation="rellu")
    with pytest.raises(UserError, match=r"norm must give a torch.nn.Module, got int: "):
        norm_layers(lambda n: n, 4, dims=2, activation="relu")  # pyright: ignore[reportArgumentType]
