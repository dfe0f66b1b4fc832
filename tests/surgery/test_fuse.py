"""Fusion: the same outputs, gradients and running statistics, in both modes, with fewer layers run."""

from __future__ import annotations

import copy
import pickle
import random
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torch_layers import without_bias

import bnkit
from bnkit import UserError
from bnkit.surgery import fuse
from bnkit.surgery._verify_training import check_training, trained


def values(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def assert_trains_alike(found: nn.Module, expected: nn.Module, x: Tensor) -> None:
    found, expected = copy.deepcopy(found).train(), copy.deepcopy(expected).train()
    upstream = None
    for model in (found, expected):
        for seed in (1, 2):
            torch.manual_seed(seed)
            y = model(x + seed)
            upstream = torch.randn_like(y) if upstream is None else upstream
            y.backward(upstream)
    torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=1e-10, atol=1e-12)
    gradients = [{name: p.grad for name, p in model.named_parameters()} for model in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(found.eval()(x), expected.eval()(x), rtol=1e-10, atol=1e-12)


class Block(nn.Module):
    """A residual block whose forward is given."""

    def __init__(self, function: Callable[[Block, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.conv2, self.conv3 = (nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(3))
        self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.relu, self.drop, self.unused = nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(1, 1)
        self.stride = 1
        self.function = function
        for bn in (self.bn1, self.bn2):
            nn.init.normal_(bn.weight)
            nn.init.normal_(bn.bias)
        self.double()


class Basic(Block):
    """torchvision's BasicBlock: one ReLU used twice, a sum in place."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.relu(out)


class Functional(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.bn1(self.conv1(x)))
        return torch.add(x, self.bn2(self.conv2(y))).tanh()


class TwoNorms(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv1(x)) + self.bn2(self.conv2(x)))


class Modules(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))


class Dropped(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.drop(self.bn1(self.conv1(x))) + x)


class ByMode(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x)) + x
        return F.relu(y) if self.training else y.relu()


class Branching(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x))
        return F.relu(y) if bool(x.sum() < 1e9) else y


class Optional(Block):
    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return y * scale if scale is not None else y


class Reused(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x))
        return F.relu(y) * y


class Broadcast(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv1(x)) + x.mean((2, 3), keepdim=True))


class InPlaceOnTheOther(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        z = y * 1
        z += self.bn1(self.conv2(x))
        return z + self.bn2(y)


class Shared(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(F.relu(self.bn1(self.conv1(x)))))


class Leaky(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.bn1(self.conv1(x)), 0.2) + F.leaky_relu(self.bn2(self.conv2(x)))


CASES = {
    Basic: {"bn1": "BatchNorm2d with relu", "bn2": "BatchNorm2d with add and relu"},
    Functional: {"bn1": "BatchNorm2d with silu", "bn2": "BatchNorm2d with add and tanh"},
    TwoNorms: {"bn1": "BatchNorm2d", "bn2": "BatchNorm2d with add and relu"},
    Modules: {"bn1": "BatchNorm2d with relu", "bn2": "BatchNorm2d"},
    Dropped: {"bn1": "BatchNorm2d"},
    ByMode: {"bn1": "BatchNorm2d; add and relu stays: the forward around it differs between training and eval mode"},
    Branching: {"bn1": "BatchNorm2d; relu stays: the forward around it can't be traced"},
    Optional: {"bn1": "BatchNorm2d; relu stays: the forward around it takes optional arguments"},
    Reused: {"bn1": "BatchNorm2d"},
    Broadcast: {"bn1": "BatchNorm2d"},
    InPlaceOnTheOther: {"bn1": "BatchNorm2d", "bn2": "BatchNorm2d"},
    Shared: {"bn1": "BatchNorm2d"},
    Leaky: {"bn1": "BatchNorm2d", "bn2": "BatchNorm2d with leaky_relu"},
}


@pytest.mark.parametrize("inside", [False, True], ids=["root", "nested"])
@pytest.mark.parametrize("kind", CASES, ids=lambda kind: kind.__name__)
def test_patterns(kind, inside):
    model = kind(kind)
    model.function = None
    if inside:
        model = nn.Sequential(nn.Conv2d(4, 4, 1), model, nn.ReLU()).double()
    prefix = "1." if inside else ""
    before = copy.deepcopy(model.state_dict())
    result = fuse(model, x := values(4, 4, 5, 5))
    for name, text in CASES[kind].items():
        assert result.changed[prefix + name].startswith(text), result
        fused = result.model.get_submodule(prefix + name)
        assert isinstance(fused, bnkit.nn.BatchNorm2d)
    assert list(result.model.state_dict()) == list(before)
    assert_trains_alike(result.model, model, x)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(pickle.loads(pickle.dumps(result.model)).eval()(x), result.model.eval()(x))


def test_a_rewritten_block_keeps_children_attributes_and_mode_and_exports():
    model = Basic(Basic)
    model.function = None
    result = fuse(model.eval(), x := values(4, 4, 5, 5))
    block = result.model
    assert isinstance(block, Basic)
    assert block.stride == 1
    assert isinstance(block.unused, nn.Linear)
    assert not block.training
    assert not block.bn1.training
    expected = model(x)
    torch.testing.assert_close(torch.export.export(block, (x,)).module()(x), expected)
    torch.testing.assert_close(torch.compile(block, backend="aot_eager", fullgraph=True)(x), expected)


@pytest.mark.parametrize("make", [
    lambda: nn.BatchNorm2d(4, affine=False),
    lambda: without_bias(nn.BatchNorm2d(4)),
    lambda: nn.BatchNorm2d(4, track_running_stats=False),
    lambda: nn.BatchNorm2d(4, eps=0.1, momentum=None),
    lambda: bnkit.nn.GhostBatchNorm(4, ghost_size=2),
], ids=["plain", "no bias", "untracked", "cumulative", "ghost"])  # fmt: skip
@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU, nn.Sigmoid, nn.Hardswish])
def test_options_of_the_norm(make, activation):
    model = nn.Sequential(nn.Conv2d(4, 4, 1), make(), activation()).double()
    result = fuse(model, x := values(4, 4, 3, 3))
    assert isinstance(result.model[2], nn.Identity)
    assert result.model[1].activation is not None
    assert_trains_alike(result.model, model, x)


@pytest.mark.parametrize(("kind", "shape"), [(nn.BatchNorm1d, (4, 3)), (nn.BatchNorm1d, (4, 3, 5)),
                                             (nn.BatchNorm3d, (2, 3, 2, 3, 4))])  # fmt: skip
def test_other_dimensions(kind, shape):
    model = nn.Sequential(kind(3), nn.ReLU()).double()
    result = fuse(model, x := values(*shape).requires_grad_(False))
    assert result.changed == {"0": f"{kind.__name__} with relu"}
    assert_trains_alike(result.model, model, x)


def test_timms_layers_lose_their_activation_to_ours():
    layers = pytest.importorskip("timm.layers")
    model = nn.Sequential(layers.BatchNormAct2d(4), layers.BatchNormAct2d(4, act_layer=nn.ELU)).double()
    result = fuse(model, x := values(4, 4, 3, 3))
    assert result.changed == {"0": "BatchNorm2d with relu"}
    assert result.skipped == {"1": "its activation is ELU"}
    assert_trains_alike(result.model, model, x)


def test_hooks_are_respected():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), nn.ReLU()).double()
    model[0].register_forward_hook(nothing)
    model[3].register_forward_hook(nothing)
    result = fuse(model, values(4, 4, 3, 3))
    assert result.skipped == {"0": "it has hooks, which would be lost"}
    assert result.changed["2"].startswith("BatchNorm2d; relu stays") or result.changed["2"] == "BatchNorm2d"
    assert isinstance(result.model[3], nn.ReLU)


def nothing(module: nn.Module, args: object, output: object) -> None:
    pass


def test_an_optimizer_follows_and_in_place_keeps_parameters():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()).double()
    parameters = list(model.parameters())
    result = fuse(model, values(4, 4, 3, 3), inplace=True)
    assert result.model is model
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


def test_a_difference_in_training_is_an_error():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
    other = copy.deepcopy(model)
    x = values(5, 3)
    check_training(other, x, None, trained(model, x, None))
    other[1].momentum = 0.2
    with pytest.raises(UserError, match=r"the buffer 1.running_(mean|var) differs"):
        check_training(other, x, None, trained(model, x, None))
    other[1].momentum = 0.1
    other[1].weight.data.mul_(1.01)
    with pytest.raises(UserError, match="the output 0 differs"):
        check_training(other, x, None, trained(model, x, None))


class EnablingGradients(Block):
    @torch.enable_grad()
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv1(x)))


class UnderNoGrad(Block):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.conv2(x)
        return F.relu(self.bn1(self.conv1(x)) + y)


class OutsideAutocast(Block):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return F.relu(self.bn1(self.conv1(x)))


class Checkpointed(Block):
    def inner(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv1(x)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)


class SometimesSkipped(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x if self.training and random.random() < 1e-9 else F.relu(self.bn1(self.conv1(x)) + x)


class SometimesSkippedByNumPy(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x if self.training and np.random.rand() < 1e-9 else F.relu(self.bn1(self.conv1(x)) + x)


class SometimesSkippedByTorch(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x if self.training and torch.rand(1).item() < 1e-9 else F.relu(self.bn1(self.conv1(x)) + x)


class Remembering(Block):
    energy, steps = None, 0

    def forward(self, x: Tensor) -> Tensor:
        self.energy = self.conv1(x).detach().mean()
        self.steps += 1
        return F.relu(self.bn1(self.conv1(x)))


class Listing(Block):
    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(1)
        return F.relu(self.bn1(self.conv1(x)))


class Counting(Block):
    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        return F.relu(self.bn1(self.conv1(x)))


class WithConstant(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv1(x))) * torch.linspace(0, 1, 4).view(1, 4, 1, 1)


WOULD_BE_LOST = {
    EnablingGradients: "enters a context",
    UnderNoGrad: "enters a context",
    OutsideAutocast: "enters a context",
    Checkpointed: "enters a context|computes with tensors",  # either, as the version of PyTorch goes
    SometimesSkipped: "draws random numbers",
    SometimesSkippedByNumPy: "draws random numbers",
    SometimesSkippedByTorch: "computes with tensors",
    Remembering: "writes attributes",
    Listing: "writes attributes",
    Counting: "computes with tensors",
    WithConstant: "computes with tensors",
}


@pytest.mark.parametrize("kind", WOULD_BE_LOST, ids=lambda kind: kind.__name__)
def test_a_forward_that_a_graph_would_lose_something_of_stays_as_it_is(kind):
    model = kind()
    model.seen = []
    model.register_buffer("count", torch.zeros(()))
    model = nn.Sequential(model).train()
    state = torch.get_rng_state()
    result = fuse(model, x := values(4, 4, 5, 5))
    assert re.search(rf"relu stays: the forward around it ({WOULD_BE_LOST[kind]})", result.changed["0.bn1"])
    for block in (model[0], result.model[0]):
        assert type(block) is kind
        assert not any(isinstance(value, torch.fx.Proxy) for value in vars(block).values())
    assert model[0].seen == []
    assert float(model[0].count) == 0
    assert torch.equal(torch.get_rng_state(), state)
    if kind is not Checkpointed:  # where torch's layers count the recomputation, and ours do not
        assert_trains_alike(result.model, model, x)


class Scaled(Block):
    """With what others ask of a block: attributes, a property, a method, a state of its own."""

    alpha = 1.0

    @property
    def out_channels(self) -> int:
        return self.conv1.out_channels

    def twice(self) -> float:
        return 2 * self.alpha

    def get_extra_state(self) -> dict[str, float]:
        return {"alpha": self.alpha}

    def set_extra_state(self, state: dict[str, float]) -> None:
        self.alpha = state["alpha"]

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv1(x))) * self.alpha


class Asking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Scaled()
        self.block.alpha = 0.5

    def forward(self, x: Tensor) -> Tensor:
        assert self.block.out_channels == 4
        return self.block(x) * self.block.twice()


def again(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copied", [lambda model: model, copy.deepcopy, again], ids=["itself", "copy", "pickle"])
def test_a_rewritten_block_is_of_its_class_and_refuses_other_attributes(copied):
    model = Asking()
    result = fuse(model, x := values(4, 4, 5, 5))
    assert result.changed["block.bn1"] == "BatchNorm2d with relu"
    fused = copied(result.model)
    assert isinstance(fused.block, Scaled)
    assert type(fused.block).__name__ == "Scaled"
    assert fused.block.stride == 1
    assert list(fused.state_dict()) == list(model.state_dict())
    assert_trains_alike(fused, model, x)
    fused.block.alpha = 0.0
    with pytest.raises(UserError, match=r"alpha was 0\.5 and is 0\.0: set it before bnkit.fuse"):
        fused(x)


def test_a_block_that_is_the_model_is_changed_in_place_and_keeps_its_hooks():
    model = Functional()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    before = copy.deepcopy(model)
    result = fuse(model, x := values(4, 4, 5, 5), inplace=True)
    assert result.model is model
    assert model.bn1.activation == "silu"
    calls.clear()
    model.eval()(x)
    assert calls == [1]
    assert_trains_alike(model, before, x)
    again = fuse(model, x).model  # nothing left to do
    assert_trains_alike(copy.deepcopy(again), before, x)


def test_a_failed_fusion_in_place_leaves_the_class():
    model = nn.Sequential(Functional())
    with pytest.raises(UserError, match="nothing was changed"):
        fuse(model, values(4, 4, 5, 5), inplace=True, tolerance=0.0)
    assert type(model[0]) is Functional
    assert type(model[0].bn1) is nn.BatchNorm2d


def test_a_gradient_that_was_not_there_is_an_error():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
    x = values(5, 3)
    expected = trained(model, x, None)
    assert expected is not None
    del expected["gradient of 0.weight"]
    with pytest.raises(UserError, match=r"the model has a gradient of 0\.weight now"):
        check_training(model, x, None, expected)


class Amplifier(nn.Module):
    """Doubles differences 36 times in training mode: rounding errors of float64 come out as 1e-5 or so."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = x.sigmoid()
            for _ in range(36):
                x = 4 * x * (1 - x)
        return x


def test_what_rounding_alone_does_to_training_is_no_reason_to_refuse():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), Amplifier(), nn.Conv2d(8, 2, 1))
    assert fuse(model, torch.randn(4, 3, 6, 6)).changed == {"1": "BatchNorm2d with relu"}


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.bn, self.act = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Sigmoid()

    def forward(self, x):
        return self.act(F.dropout(self.bn(self.fc(x)), 0.5, self.training))


def test_an_activation_behind_a_dropout_stays_behind_it():
    model, one = Dropping(), torch.randn(1, 8)
    with pytest.warns(UserWarning, match="in eval mode alone"):
        result = fuse(model, one)  # of one value a channel, on which it can't train
    assert result.changed == {"bn": "BatchNorm1d"}
    assert type(result.model.act) is nn.Sigmoid
    x = torch.randn(6, 8)
    torch.manual_seed(0)
    expected = model.train()(x)
    torch.manual_seed(0)
    torch.testing.assert_close(result.model.train()(x), expected)


def test_a_norm_stays_ahead_of_a_write_to_its_input():
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            h = self.conv(x).sigmoid()
            y = self.bn(h)
            h.mul_(2)
            return F.relu(y) + h

    model, x = Writes().eval(), torch.randn(2, 3, 4, 4)
    with pytest.warns(UserWarning, match="in eval mode alone"):
        result = fuse(model, x)  # whose own backward pass fails: the batch norm has saved its input
    assert result.changed == {"bn": "BatchNorm2d with relu"}
    torch.testing.assert_close(result.model(x), model(x))


def test_an_input_overwritten_through_a_view_does_not_wait_for_the_addition():
    class Aliased(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            h = self.conv(x)
            y = self.bn(h.flatten(2).unflatten(2, h.shape[2:]))
            return y + h.mul_(2)

    model, x = Aliased().eval(), torch.randn(2, 3, 4, 4)
    with pytest.warns(UserWarning, match="in eval mode alone"):
        result = fuse(model, x)
    assert result.changed == {"bn": "BatchNorm2d"}
    torch.testing.assert_close(result.model(x), model(x))


class Doubling(nn.Module):
    """Doubles what it has added, or what it has normalized, between the addition and the activation."""

    def __init__(self, added: bool):
        super().__init__()
        self.conv, self.bn, self.added = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), added

    def forward(self, x):
        h = self.conv(x)
        s = self.bn(h.flatten(2).unflatten(2, h.shape[2:])) + x
        twice = (x if self.added else h).mul_(2)
        return F.relu(s) + twice


@pytest.mark.parametrize("added", [True, False])
def test_an_addition_stays_ahead_of_a_write_to_its_terms(added):
    def copied(model, x):
        return model(x.clone())

    model, x = Doubling(added).eval(), torch.randn(2, 3, 4, 4)
    with torch.no_grad(), pytest.warns(UserWarning, match="in eval mode alone"):
        result = fuse(model, x, forward=copied)
    assert result.changed == {"bn": "BatchNorm2d with add and relu"}
    torch.testing.assert_close(copied(result.model, x), copied(model, x))
