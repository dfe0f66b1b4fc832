from __future__ import annotations

import copy
import pickle
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple

import pytest
import timm.layers
import torch
import torchvision
from torch import nn

import bnkit
from bnkit import UserError
from bnkit.surgery import convert, freeze, unfreeze
from bnkit.surgery._remainder import ChannelAffine


def net(norm=nn.BatchNorm2d) -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), norm(4), nn.ReLU(), norm(4)).train()
    with torch.no_grad():
        for i in (1, 3):
            model[i].running_mean.normal_()
            model[i].running_var.uniform_(0.5, 2)
            model[i].weight.uniform_(0.5, 2)
    model[1].momentum = 0.3
    model[3].bias.requires_grad_(False)
    return model


def image():
    return torch.randn(4, 3, 5, 5)


def facts(model: nn.Module) -> list[tuple]:
    return [
        (
            type(m),
            m.momentum,
            m.eps,
            m.training,
            {name: value for name, value in vars(m).items() if not name.startswith("_")},
            [p.requires_grad for p in m.parameters()],
            [t.tolist() for t in m.state_dict().values()],
        )
        for m in model.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm)
    ]


NORMS = [nn.BatchNorm2d, bnkit.nn.BatchNorm2d, bnkit.nn.GhostBatchNorm, bnkit.nn.SyncBatchNorm, nn.SyncBatchNorm]
NORMS += [timm.layers.BatchNormAct2d]


@pytest.mark.parametrize("norm", NORMS, ids=lambda n: f"{n.__module__.split('.')[0]}-{n.__name__}")
def test_frozen_through_training_and_undone_exactly(norm):
    model, x = net(norm), image()
    model[3].eval()
    before = facts(model)
    frozen = freeze(model).model.train()
    expected = copy.deepcopy(model).eval()(x)
    statistics = [b.clone() for b in frozen.buffers()]
    torch.testing.assert_close(frozen(x), expected)
    assert all(torch.equal(a, b) for a, b in zip(statistics, frozen.buffers(), strict=True))
    assert [name for name, p in frozen.named_parameters() if p.requires_grad] == ["0.weight", "0.bias"]
    assert list(frozen.state_dict()) == list(model.state_dict())
    assert facts(model) == before
    assert facts(unfreeze(frozen).model) == before


def test_statistics_alone_and_affine_alone():
    model = net()
    statistics = freeze(model, affine=False).model.train()
    assert isinstance(statistics[1], bnkit.nn.FrozenBatchNorm2d)
    assert [p.requires_grad for p in statistics[1].parameters()] == [True, True]
    affine = freeze(model, statistics=False).model
    assert type(affine[1]) is nn.BatchNorm2d
    assert [p.requires_grad for p in affine[3].parameters()] == [False, False]
    assert [p.requires_grad for p in unfreeze(affine).model[3].parameters()] == [True, False]
    both = freeze(statistics).model
    half = unfreeze(both, statistics=False).model
    assert isinstance(half[1], bnkit.nn.FrozenBatchNorm2d)
    assert half[1].weight.requires_grad
    assert facts(unfreeze(half).model) == facts(model)
    half = unfreeze(both, affine=False).model
    assert type(half[1]) is nn.BatchNorm2d
    assert not half[1].weight.requires_grad
    assert facts(unfreeze(half).model) == facts(model)


def test_affine_memory_survives_a_conversion():
    model = net()
    frozen = freeze(model, statistics=False).model
    other = convert(convert(frozen, "sync").model, "torch").model
    assert not other[1].weight.requires_grad
    assert facts(unfreeze(other).model) == facts(model)


def test_in_place_with_an_optimizer():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.1)
    parameters = list(model.parameters())
    result = freeze(model, inplace=True)
    assert result.model is model
    before = model[1].weight.clone()
    model(image()).square().mean().backward()
    optimizer.step()
    assert torch.equal(model[1].weight, before)
    unfreeze(model, inplace=True)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


def test_pickled_in_between():
    model = net(bnkit.nn.GhostBatchNorm)
    frozen = pickle.loads(pickle.dumps(freeze(model).model))
    assert facts(unfreeze(frozen).model) == facts(model)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, bnkit.nn.BatchNorm1d])
def test_a_bare_layer(norm):
    layer = norm(3).train()
    frozen = freeze(layer).model
    assert not frozen.train().training
    thawed = unfreeze(frozen).model
    assert type(thawed) is norm
    assert thawed.training


def test_the_models_mode_may_change_in_between():
    frozen = freeze(net()).model.eval()
    assert not unfreeze(frozen).model[1].training
    assert unfreeze(frozen.train()).model[1].training


def test_where_twice_and_reports():
    model = net()
    result = freeze(model, where="1")
    assert result.changed == {"1": "froze statistics and affine"}
    again = freeze(result.model)
    assert again.skipped == {"1": "is frozen already"}
    assert set(again.changed) == {"3"}
    assert unfreeze(model).skipped == {"1": "is not frozen", "3": "is not frozen"}
    with pytest.raises(UserError, match="leave one True"):
        freeze(model, False, False)


def test_layers_built_frozen():
    model = nn.Sequential(bnkit.nn.FrozenBatchNorm2d(3, trainable=False), torchvision.ops.FrozenBatchNorm2d(3)).train()
    thawed = unfreeze(model).model
    assert [type(m) for m in thawed] == [bnkit.nn.BatchNorm2d] * 2
    assert all(p.requires_grad for p in thawed.parameters())
    assert all(m.training for m in thawed)


def test_without_running_statistics():
    model = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False))
    assert "keeps no running statistics" in freeze(model).skipped["0"]
    assert freeze(model, statistics=False).changed == {"0": "froze affine"}


Pair = namedtuple("Pair", ["first", "second"])


class Named(list):
    """A list with an attribute, and a constructor of its own."""

    def __init__(self, name, items):
        super().__init__(items)
        self.name = name


class Triple(tuple):
    def __new__(cls, a, b, c):
        return super().__new__(cls, (a, b, c))

    def __getnewargs__(self):
        return tuple(self)


def marked(value, mark):
    value.mark = mark
    return value


CONTAINERS = {
    "list": lambda norm: [norm, 1],
    "list subclass": lambda norm: Named("norms", [norm]),
    "tuple": lambda norm: (norm, 1),
    "tuple subclass": lambda norm: marked(Triple(0, norm, 2), "mark"),
    "namedtuple": lambda norm: Pair("text", norm),
    "dict": lambda norm: {"a": 1, "norm": norm, "b": 2},
    "keys of a dict": lambda norm: {"a": 1, norm: "norm", "b": 2},
    "OrderedDict": lambda norm: OrderedDict(a=1, norm=norm, b=2),
    "defaultdict": lambda norm: defaultdict(list, norms=[norm]),
    "Counter": lambda norm: Counter({"a": 3, norm: 2}),
    "deque": lambda norm: deque([1, norm], maxlen=2),
    "set": lambda norm: {norm, 1},
    "frozenset": lambda norm: frozenset({norm, (norm, 1)}),
    "nested": lambda norm: OrderedDict(a=[deque([Pair({"norms": (norm,)}, 3)])]),
    "a module that is not registered": lambda norm: [nn.Sequential(norm, nn.ReLU())],
}


class Holding(nn.Module):
    """Runs its layer out of containers, one of which two attributes hold."""

    def __init__(self, contain):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.held = self.same = contain(self.norm)

    def forward(self, x):
        for norm in norms_in(self.held):
            x = norm(x)
        return x


def norms_in(value):
    if isinstance(value, nn.Module):
        return [m for m in value.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if isinstance(value, dict):
        value = value.items()
    return [m for item in value for m in norms_in(item)] if not isinstance(value, (str, int)) else []


def shown(value, norm):
    """Classes, attributes and contents, in order, with "norm" for the layer."""
    if isinstance(value, nn.Module):
        return "norm" if value is norm else [shown(child, norm) for child in value.children()]
    if not isinstance(value, (list, tuple, dict, set, frozenset, deque)):
        return value
    items = [shown(item, norm) for item in (value.items() if isinstance(value, dict) else value)]
    if isinstance(value, (set, frozenset)):
        items.sort(key=str)
    extra = getattr(value, "default_factory", None), getattr(value, "maxlen", None), getattr(value, "__dict__", None)
    return type(value), extra, items


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("contain", CONTAINERS.values(), ids=CONTAINERS)
def test_layers_in_containers_are_frozen_there_too(contain, inplace):
    model, x = Holding(contain).train(), torch.randn(4, 3, 5, 5) + 7
    before = shown(model.held, model.norm)
    frozen = freeze(model, inplace=inplace).model.train()
    frozen(x)
    assert set(norms_in(frozen.held)) == {frozen.norm}
    assert frozen.norm.running_mean.tolist() == [0, 0, 0]
    assert shown(frozen.held, frozen.norm) == shown(frozen.same, frozen.norm) == before
    if not isinstance(frozen.held, (tuple, frozenset)):
        assert frozen.held is frozen.same
    thawed = unfreeze(frozen, inplace=inplace).model.train()
    thawed(x)
    assert shown(thawed.held, thawed.norm) == before
    assert min(thawed.norm.running_mean.tolist()) > 0.5


@pytest.mark.parametrize("contain", CONTAINERS.values(), ids=CONTAINERS)
def test_containers_are_as_before_if_surgery_fails(contain):
    model = Holding(contain)
    norm, held = model.norm, model.held
    before = shown(held, norm)
    with pytest.raises(UserError, match="convert must leave the outputs as they were"):
        convert(model, "batch", example=torch.randn(4, 3, 5, 5), tolerance=-1.0, inplace=True)
    assert model.norm is norm
    assert model.held is model.same is held
    assert shown(held, norm) == before


def test_containers_that_hold_themselves():
    model = Holding(lambda norm: [norm])
    model.held.append(model.held)
    freeze(model, inplace=True)
    assert model.held[0] is model.norm
    assert model.held[1] is model.held


def test_what_stands_for_a_batch_norm_trains_as_that_did():
    def needs_gradients(norm):
        return [p.requires_grad for p in ChannelAffine(torch.ones(3), torch.zeros(3), like=norm).parameters()]

    norm = nn.BatchNorm2d(3)
    assert needs_gradients(None) == needs_gradients(norm) == [True, True]
    norm.weight.requires_grad_(False)
    assert needs_gradients(norm) == [False, True]
    assert needs_gradients(nn.BatchNorm2d(3, affine=False)) == [False, False]
    assert needs_gradients(torchvision.ops.FrozenBatchNorm2d(3)) == [False, False]


def test_what_was_frozen_before_stays_so():
    model = nn.Sequential(
        nn.Conv2d(3, 3, 1),
        bnkit.nn.FrozenBatchNorm2d(3),
        torchvision.ops.FrozenBatchNorm2d(3),
        nn.BatchNorm2d(3),
    ).train()
    model[3] = convert(model[3], "frozen").model
    model.append(nn.BatchNorm2d(3))
    frozen = freeze(model)
    assert frozen.skipped == {"2": "is frozen already"}
    assert [type(m) for m in frozen.model[:4]] == [type(m) for m in model[:4]]
    thawed = unfreeze(frozen.model)
    assert set(thawed.changed) == {"1", "3", "4"}
    assert [type(m) for m in thawed.model] == [type(m) for m in model]
    assert [p.requires_grad for p in thawed.model.parameters()] == [p.requires_grad for p in model.parameters()]
    assert thawed.skipped == {"2": "was frozen before freeze: unfreeze once more"}
    again = unfreeze(thawed.model).model
    kinds = [bnkit.nn.BatchNorm2d, bnkit.nn.BatchNorm2d, nn.BatchNorm2d, nn.BatchNorm2d]
    assert [type(m) for m in again[1:]] == kinds


def test_every_frozen_layer_is_a_frozen_batch_norm():
    for dims in (1, 2, 3):
        layer = getattr(bnkit.nn, f"FrozenBatchNorm{dims}d")(3)
        assert isinstance(layer, bnkit.nn.FrozenBatchNorm)
        with pytest.raises(UserError, match=f"expected {'2D or 3D' if dims == 1 else f'{dims + 2}D'}"):
            layer(torch.randn(2, *[3] * (1 + dims % 3 + 1)))
