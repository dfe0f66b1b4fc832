"""Fusion: the same outputs, gradients and running statistics, in both modes, with fewer layers run."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnkit
from bnkit import UserError
from bnkit.surgery import fuse
from bnkit.surgery._fuse_verify import check_training, trained


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

    def __init__(self, function: Callable[[Block, Tensor], Tensor]) -> None:
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
    assert isinstance(block, torch.fx.GraphModule)
    assert block.stride == 1
    assert isinstance(block.unused, nn.Linear)
    assert not block.training
    assert not block.bn1.training
    expected = model(x)
    torch.testing.assert_close(torch.export.export(block, (x,)).module()(x), expected)
    torch.testing.assert_close(torch.compile(block, backend="aot_eager", fullgraph=True)(x), expected)


@pytest.mark.parametrize("make", [
    lambda: nn.BatchNorm2d(4, affine=False),
    lambda: nn.BatchNorm2d(4, bias=False),
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
