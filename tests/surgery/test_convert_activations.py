"""Layers that add a residual or activate, made into norms that don't."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import timm.layers
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import bnkit
from bnkit import UserError
from bnkit.nn import Fused
from bnkit.surgery import convert, freeze, fuse, unfreeze


def randomized(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith(("bias", "running_mean")):
                tensor.normal_(generator=generator)
            elif "bn" in name or tensor.dim() == 1:
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return model


def images(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


ZOO = {
    "resnet20": (4, 3, 32, 32),  # additions
    "vgg11": (4, 3, 32, 32),
    "densenet40": (4, 3, 32, 32),  # pre-activation
    "seresnet18": (4, 3, 64, 64),  # norms without an activation
    "lenet5": (4, 1, 28, 28),  # vectors too
}
BY_HAND = {
    "group": lambda channels: nn.GroupNorm(math.gcd(32, channels), channels),
    "layer": lambda channels: nn.GroupNorm(1, channels),
    "instance": lambda channels: nn.InstanceNorm2d(channels, affine=True),
    "torch": nn.BatchNorm2d,
}


def created(name: str, norm) -> nn.Module:
    shape = ZOO[name]
    options = {"image_size": shape[-1]} if name in ("vgg11", "lenet5") else {}
    return bnkit.models.create(name, norm, num_classes=5, in_channels=shape[1], **options)


@pytest.mark.parametrize("to", BY_HAND)
@pytest.mark.parametrize("name", [name for name in ZOO if name != "lenet5"])
def test_our_networks_become_those_built_so(name: str, to: str):
    model, x = randomized(created(name, "batch")).eval(), images(*ZOO[name])
    result = convert(model, to)
    assert result.skipped == {}
    assert not any(isinstance(m, Fused) for m in result.model.modules())
    expected = created(name, BY_HAND[to])
    kept = {key: tensor for key, tensor in model.state_dict().items() if key in expected.state_dict()}
    expected.load_state_dict(kept)
    assert list(result.model.state_dict()) == list(expected.state_dict())
    assert [type(m).__name__ for m in result.model.modules()] == [type(m).__name__ for m in expected.modules()]
    torch.testing.assert_close(result.model.eval()(x), expected.eval()(x))
    torch.testing.assert_close(dropping_alike(result.model.train(), x), dropping_alike(expected.train(), x))


def dropping_alike(model: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(0)
    return model(x)


def test_vectors_and_maps():
    model = randomized(created("lenet5", "batch")).eval()
    result = convert(model, "torch", example=images(*ZOO["lenet5"]))
    assert result.skipped == {}
    assert {type(m) for m in result.model.modules() if "BatchNorm" in type(m).__name__} == {
        nn.BatchNorm1d,
        nn.BatchNorm2d,
    }


def test_there_and_back():
    model, x = randomized(created("resnet20", "batch")), images(4, 3, 32, 32)
    plain = convert(model, "torch").model
    back = convert(plain, "batch", example=x).model
    assert {type(m) for m in back.modules() if isinstance(m, nn.BatchNorm2d)} == {bnkit.nn.BatchNorm2d}
    torch.testing.assert_close(back.train()(x), copy.deepcopy(model).train()(x))
    assert fuse(back, x).max_error < 1e-5


def test_only_what_where_means_gets_its_activation_back():
    model, x = randomized(created("resnet20", "batch")).eval(), images(2, 3, 32, 32)
    some = convert(model, "torch", where="layer1*", example=x).model
    torch.testing.assert_close(some(x), model(x))
    assert {type(m) for name, m in some.named_modules() if name.endswith("act1")} == {nn.ReLU, Fused}


@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu", "elu", "silu", "gelu", "sigmoid", "tanh"])
@pytest.mark.parametrize("to", ["group", "layer", "instance"])
def test_layers_on_their_own_activate_and_add(to: str, activation: str | None):
    layer = randomized(bnkit.nn.BatchNorm2d(6, activation=activation))
    x, residual = images(3, 6, 4, 4).requires_grad_(), images(3, 6, 4, 4) + 1
    new = convert(layer, to, groups=3).model if to == "group" else convert(layer, to).model
    groups = {"group": 3, "layer": 1, "instance": 6}[to]
    plain = F.group_norm(x, groups, layer.weight, layer.bias, layer.eps)
    activate = (lambda y: y) if activation is None else getattr(torch, activation, None) or getattr(F, activation)
    upstream = images(3, 6, 4, 4)
    for found, expected in ((new(x), activate(plain)), (new(x, residual=residual), activate(plain + residual))):
        torch.testing.assert_close(found, expected)
        gradients = [torch.autograd.grad(y, x, upstream, retain_graph=True)[0] for y in (found, expected)]
        torch.testing.assert_close(*gradients)
    assert isinstance(new, nn.GroupNorm if to != "instance" else nn.InstanceNorm2d)
    assert set(new.state_dict()) == {"weight", "bias"}
    for twin in (copy.deepcopy(new), pickle.loads(pickle.dumps(new))):
        assert torch.equal(twin(x, residual), new(x, residual))
    assert (activation is None) == (f"activation={activation}" not in repr(new))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 1), bnkit.nn.BatchNorm2d(4, activation="relu")

    def forward(self, x):
        return self.bn(self.conv(x), x)


def test_a_residual_is_added_by_the_new_norm():
    model, x = randomized(Residual()), images(2, 4, 3, 3)
    grouped = convert(model, "group", groups=2, example=x).model
    y = F.group_norm(model.conv(x), 2, model.bn.weight, model.bn.bias) + x
    torch.testing.assert_close(grouped(x), y.relu())
    traced = torch.fx.symbolic_trace(grouped)
    torch.testing.assert_close(traced(x), y.relu())


def test_timms_layers_with_an_activation():
    model = nn.Sequential(timm.layers.BatchNormAct2d(4, act_layer=nn.SiLU), timm.layers.BatchNormAct2d(4))
    new, x = convert(model, "group", groups=2).model, images(2, 4, 3, 3)
    torch.testing.assert_close(new(x), F.group_norm(F.silu(F.group_norm(x, 2)), 2).relu())


@pytest.mark.parametrize("name", ["GELU", "HardSwish", "Sigmoid", "Swish", "Tanh"])
def test_timms_own_activations(name: str):
    act = getattr(timm.layers.activations, name)
    model, x = nn.Sequential(timm.layers.BatchNormAct2d(3, act_layer=act)).eval(), images(2, 3, 4, 4)
    for result in (convert(model, "batch", example=x), convert(model, "frozen"), fuse(model, x)):
        assert result.skipped == {}
        torch.testing.assert_close(result.model(x), model(x))
    assert type(convert(convert(model, "batch").model, timm.layers.BatchNormAct2d).model[0]) is type(model[0])


def stack(norm=nn.BatchNorm2d) -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), norm(4), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1), norm(4), nn.SiLU())
    return randomized(model)


@pytest.mark.parametrize("through", [None, "batch", "ghost"])
def test_what_fuse_took_up_comes_back(through: str | None):
    model, x = stack(), images(3, 3, 5, 5)
    known = model if through is None else convert(model, through).model
    fused = fuse(known, x).model
    assert [type(m) for m in fused if isinstance(m, nn.Identity)] == [Fused, Fused]
    back = convert(fused, "torch", example=x)
    assert back.skipped == {}
    assert [type(m) for m in back.model] == [type(m) for m in model]
    torch.testing.assert_close(back.model.eval()(x), copy.deepcopy(model).eval()(x))


def test_what_a_rewritten_forward_takes_from_a_layer_stays_with_it():
    model, x = randomized(torchvision.models.resnet18(num_classes=3)), images(2, 3, 32, 32)
    fused = fuse(convert(model, "batch").model, x).model
    result = convert(fused, "torch", example=x)
    assert result.skipped["layer1.0.bn1"] == "applies relu, which BatchNorm2d can't"
    assert result.skipped["layer1.0.bn2"] == "adds a residual, which BatchNorm2d can't"
    assert type(result.model.layer2[0].downsample[1]) is nn.BatchNorm2d
    torch.testing.assert_close(result.model.eval()(x), copy.deepcopy(model).eval()(x))
    grouped = convert(fused, "group", example=x)
    assert grouped.skipped == {}
    expected = convert(model, "group").model
    torch.testing.assert_close(grouped.model(x), expected(x))


def test_an_addition_without_activation_is_not_lost():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x):
            return self.bn(x * 2) + x

    fused = fuse(Sum(), images(2, 3, 4, 4)).model
    assert convert(fused, "torch").skipped == {"bn": "adds a residual, which BatchNorm2d can't"}
    assert convert(convert(fused, "sync").model, "torch").skipped == {"bn": "adds a residual, which BatchNorm2d can't"}


def test_timms_own_activation_and_another():
    model = nn.Sequential(timm.layers.BatchNormAct2d(3, apply_act=False), nn.ReLU())
    fused = fuse(convert(model, "batch").model, images(2, 3, 4, 4)).model
    assert fused[0].activation == "relu"
    back = convert(fused, timm.layers.BatchNormAct2d, example=images(2, 3, 4, 4))
    assert [type(m) for m in back.model] == [timm.layers.BatchNormAct2d, nn.ReLU]


def test_frozen_layers_that_were_fused():
    model, x = stack(), images(3, 3, 5, 5)
    fused = fuse(freeze(model).model, x).model
    thawed = unfreeze(fused).model
    assert [type(m) for m in thawed if isinstance(m, nn.BatchNorm2d)] == [bnkit.nn.BatchNorm2d] * 2
    assert [m.activation for m in thawed if isinstance(m, nn.BatchNorm2d)] == ["relu", "silu"]
    assert all(p.requires_grad for p in thawed.parameters())
    torch.testing.assert_close(thawed.train()(x), copy.deepcopy(model).train()(x))
    thawed = unfreeze(fuse(freeze(model, statistics=False).model, x).model).model
    assert all(p.requires_grad for p in thawed.parameters())


def test_the_placeholder_follows_its_layer():
    model = created("resnet20", "batch")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), convert(model, "ghost").model):
        assert twin.act1.norm is twin.bn1
    assert list(model.act1.modules()) == [model.act1]
    assert list(model.act1.parameters()) == []


def test_a_placeholder_with_hooks_stays():
    model = created("resnet20", "batch")
    model.act1.register_forward_hook(lambda *_: None)
    assert convert(model, "torch").skipped == {"bn1": "applies relu, which BatchNorm2d can't"}


def test_a_failure_puts_all_back():
    model = created("resnet20", "batch")
    with pytest.raises(UserError, match="differ"):
        convert(model, "torch", example=images(2, 3, 32, 32), tolerance=-1.0, inplace=True)
    assert type(model.act1) is Fused
    assert model.act1.norm is model.bn1
    assert model.bn1.activation == "relu"


def test_training_is_compared(monkeypatch):
    model, x = stack().train(), images(3, 3, 5, 5)
    convert(model, "batch", example=x)

    def other(self, input, residual=None):
        return super(bnkit.nn.BatchNorm2d, self).forward(input, residual) * (2 if self.training else 1)

    monkeypatch.setattr(bnkit.nn.BatchNorm2d, "forward", other)
    with pytest.raises(UserError, match="convert must leave training as it was"):
        convert(model, "batch", example=x)


@pytest.mark.parametrize("to", ["torch", "group"])
def test_an_activation_that_was_taken_away_does_not_come_back(to: str):
    model = convert(created("resnet20", "batch"), "batch", activation=None).model
    result = convert(model, to)
    assert result.skipped == {}
    assert type(result.model.act1) is nn.Identity
