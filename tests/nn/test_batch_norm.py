"""BatchNorm1d, 2d and 3d beside torch.nn's, and what they do that torch.nn's do not."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch_layers import without_bias

import bnkit.nn
from bnkit.functional import batch_norm

pytestmark = pytest.mark.usefixtures("backend")

LAYERS = [(bnkit.nn.BatchNorm1d, nn.BatchNorm1d), (bnkit.nn.BatchNorm2d, nn.BatchNorm2d)]
LAYERS += [(bnkit.nn.BatchNorm3d, nn.BatchNorm3d)]
SHAPES = {"BatchNorm1d": (6, 4, 5), "BatchNorm2d": (6, 4, 5, 5), "BatchNorm3d": (3, 4, 2, 3, 3)}
OPTIONS = [
    {},
    {"momentum": None},
    {"momentum": 0.9, "eps": 1e-3},
    {"affine": False},
    {"affine": True, "bias": False},
    {"track_running_stats": False},
]


def pair(ours, theirs, **options):
    """One layer of each kind with the same random state."""
    has_bias = options.pop("bias", True)
    mine, other = ours(4, bias=has_bias, **options), theirs(4, **options)
    if not has_bias:
        without_bias(other)
    for tensor in (*other.parameters(), *other.buffers()):
        if tensor.is_floating_point():
            tensor.data.uniform_(0.5, 2.0)
    mine.load_state_dict(other.state_dict())
    return mine, other


def batches(ours, count):
    return [torch.randn(SHAPES[ours.__name__]) * (i + 1) + i for i in range(count)]


def assert_same_state(mine, other, **tolerance):
    wanted = other.state_dict()
    assert list(mine.state_dict()) == list(wanted)
    for name, tensor in mine.state_dict().items():
        torch.testing.assert_close(tensor, wanted[name], msg=lambda m, n=name: f"{n}: {m}", **tolerance)


@pytest.mark.parametrize("steps", [0, 1, 2, 30])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("ours", "theirs"), LAYERS)
def test_state_and_output_follow_torch(ours, theirs, options, steps):
    mine, other = pair(ours, theirs, **options)
    for x in batches(ours, steps):
        ours_x, theirs_x = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, wanted = mine(ours_x), other(theirs_x)
        torch.testing.assert_close(y, wanted, atol=2e-6, rtol=2e-6)
        dy = torch.randn_like(x)
        y.backward(dy)
        wanted.backward(dy)
        torch.testing.assert_close(ours_x.grad, theirs_x.grad, atol=1e-5, rtol=1e-5)
    assert_same_state(mine, other)
    for p, q in zip(mine.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-4, rtol=1e-4)
    x = batches(ours, 1)[0]
    torch.testing.assert_close(mine.eval()(x), other.eval()(x), atol=2e-6, rtol=2e-6)
    assert_same_state(mine, other)


def test_running_statistics_by_value():
    """From 0 and 1, by hand: new = 0.9 old + 0.1 batch, and the variance of 1, 3 is 2 when divided by n - 1."""
    layer = bnkit.nn.BatchNorm1d(1)
    assert (layer.running_mean.item(), layer.running_var.item(), layer.num_batches_tracked.item()) == (0.0, 1.0, 0)
    layer(torch.tensor([[1.0], [3.0]]))
    assert layer.running_mean.item() == pytest.approx(0.2)
    assert layer.running_var.item() == pytest.approx(0.9 + 0.1 * 2)
    layer(torch.tensor([[5.0], [9.0]]))
    assert layer.running_mean.item() == pytest.approx(0.2 * 0.9 + 0.7)
    assert layer.running_var.item() == pytest.approx(1.1 * 0.9 + 0.1 * 8)
    assert layer.num_batches_tracked.item() == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_momentum_none_is_the_mean_over_batches(dtype):
    layer = bnkit.nn.BatchNorm1d(3, momentum=None, dtype=dtype)
    data = torch.randn(300, 16, 3).to(dtype)
    for x in data:
        layer(x)
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
    wanted = data.double().var(1).mean(0), data.double().mean(1).mean(0)
    torch.testing.assert_close(layer.running_var.double(), wanted[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(layer.running_mean.double(), wanted[1], rtol=tolerance, atol=tolerance)
    assert layer.num_batches_tracked == 300


@pytest.mark.parametrize(("ours", "theirs"), LAYERS)
def test_activation_and_residual(ours, theirs):
    mine, other = pair(ours, theirs)
    mine.activation = "silu"
    x, residual = batches(ours, 2)
    torch.testing.assert_close(mine(x, residual), nn.functional.silu(other(x) + residual), atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(
        mine.eval()(x, residual=residual), nn.functional.silu(other.eval()(x) + residual), atol=2e-6, rtol=2e-6
    )


@pytest.mark.parametrize(("ours", "theirs"), LAYERS)
def test_is_a_drop_in_for_torchs(ours, theirs):
    """isinstance checks, such as initializers, converters and FSDP make, hold; arguments may be given by position."""
    layer = ours(4, 1e-3, 0.2, True, True, "cpu", torch.float64)
    assert isinstance(layer, theirs)
    assert isinstance(layer, nn.modules.batchnorm._BatchNorm)
    assert (layer.eps, layer.momentum, layer.weight.dtype) == (1e-3, 0.2, torch.float64)
    assert layer._version == theirs(4)._version


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("ours", "theirs"), LAYERS)
def test_state_dicts_load_both_ways(ours, theirs, options):
    mine, other = pair(ours, theirs, **options)
    for x in batches(ours, 2):
        mine(x)
    other.load_state_dict(mine.state_dict())
    assert_same_state(mine, other, atol=0, rtol=0)
    file = io.BytesIO()
    torch.save(other.state_dict(), file)
    fresh = ours(4, **options)
    fresh.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert_same_state(fresh, mine, atol=0, rtol=0)


def test_state_dicts_from_before_the_count_load():
    """PyTorch 0.4 and earlier had no num_batches_tracked."""
    state = nn.BatchNorm2d(4).state_dict()
    del state["num_batches_tracked"]
    del state._metadata[""]["version"]
    layer = bnkit.nn.BatchNorm2d(4)
    layer.load_state_dict(state)
    assert layer.num_batches_tracked == 0


def test_buffers_switched_off_after_construction():
    """As in torch.nn: batch statistics in training, the stale buffers in eval."""
    mine, other = pair(bnkit.nn.BatchNorm2d, nn.BatchNorm2d)
    mine.track_running_stats = other.track_running_stats = False
    x = torch.randn(6, 4, 5, 5)
    torch.testing.assert_close(mine(x), other(x))
    assert_same_state(mine, other, atol=0, rtol=0)
    torch.testing.assert_close(mine.eval()(x), other.eval()(x))


def test_repr():
    assert repr(bnkit.nn.BatchNorm2d(3)) == repr(nn.BatchNorm2d(3))
    text = repr(bnkit.nn.BatchNorm1d(3, activation="relu", skip_nonfinite=True))
    assert text.endswith("track_running_stats=True, activation=relu, skip_nonfinite=True)")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_parameters_and_buffers_in_float32(dtype):
    conv, mine = nn.Conv2d(3, 4, 3), bnkit.nn.BatchNorm2d(4, activation="relu")
    x = torch.randn(2, 3, 8, 8)
    with torch.autocast("cpu", dtype):
        z = conv(x)
        y = mine(z)
    assert (z.dtype, y.dtype) == (dtype, dtype)
    y.backward(torch.randn_like(y))
    assert {t.dtype for t in (*mine.parameters(), mine.running_mean, mine.running_var)} == {torch.float32}
    assert {p.grad.dtype for p in mine.parameters()} == {torch.float32}
    torch.testing.assert_close(mine.running_var, 0.9 + 0.1 * z.float().transpose(0, 1).flatten(1).var(1))


def test_pickle_and_deepcopy():
    layer = bnkit.nn.BatchNorm2d(4, momentum=None, activation="gelu", skip_nonfinite=True)
    x = torch.randn(3, 4, 5, 5)
    layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert repr(twin) == repr(layer)
        assert_same_state(twin, layer, atol=0, rtol=0)
        assert torch.equal(twin.eval()(x), layer.eval()(x))
        layer.train()


def test_double_backward():
    """A gradient penalty: the derivative of the size of a derivative."""
    mine, other = pair(bnkit.nn.BatchNorm2d, nn.BatchNorm2d)
    mine, other = mine.double(), other.double()
    penalties = []
    for layer in (mine, other):
        torch.manual_seed(1)
        x = torch.randn(3, 4, 5, 5, dtype=torch.float64, requires_grad=True)
        slope = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)[0]
        slope.square().sum().backward()
        penalties += [(x.grad, layer.weight.grad)]
    for ours, theirs in zip(*penalties, strict=True):
        torch.testing.assert_close(ours, theirs)


BAD = {
    "wrong dimensions": (bnkit.nn.BatchNorm2d(4), torch.zeros(3, 4), r"expected 4D input \(got 2D input\)"),
    "one value a channel": (bnkit.nn.BatchNorm1d(4), torch.zeros(1, 4), "Expected more than 1 value per channel"),
    "eps 0": (bnkit.nn.BatchNorm1d(4, eps=0.0), torch.zeros(3, 4), "eps must be positive"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_refused_batch_is_not_counted(case):
    layer, x, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        layer(x)
    assert layer.num_batches_tracked == 0


def test_unknown_activation_is_refused_at_once():
    with pytest.raises(ValueError, match=r"unknown activation 'swish': did you mean hardswish\?"):
        bnkit.nn.BatchNorm2d(4, activation="swish")


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38])
def test_skip_nonfinite_keeps_the_batch_out(bad, momentum):
    """3e38 is finite, its variance is not."""
    guarded, plain = (bnkit.nn.BatchNorm1d(3, momentum=momentum, skip_nonfinite=skip) for skip in (True, False))
    good = torch.randn(2, 8, 3)
    poisoned = good[0].clone()
    poisoned[2, 1] = bad
    guarded(poisoned)
    assert guarded.num_batches_tracked == 0
    assert torch.equal(guarded.running_mean, torch.zeros(3))
    assert torch.equal(guarded.running_var, torch.ones(3))
    plain(poisoned)
    assert not plain.running_var.isfinite().all()
    plain.reset_running_stats()
    for x in good:
        guarded(x)
        plain(x)
    assert_same_state(guarded, plain, atol=0, rtol=0)


class Block(nn.Module):
    """Two layers, a residual between."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.first = bnkit.nn.BatchNorm2d(4, activation="relu")
        self.last = bnkit.nn.BatchNorm2d(4, momentum=None)

    def forward(self, x):
        return self.last(self.first(self.conv(x)), x)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("nested", [False, True])
def test_checkpointing_counts_each_batch_once(use_reentrant, nested):
    block, x = Block(), torch.randn(2, 4, 6, 6, requires_grad=True)
    wanted = copy.deepcopy(block)

    def once(z):
        return checkpoint(block, z, use_reentrant=use_reentrant)

    def twice(z):
        return checkpoint(once, z, use_reentrant=use_reentrant)

    for forward in (wanted, twice if nested else once):
        for _ in range(3):
            forward(x).pow(3).sum().backward()
    assert block.first.num_batches_tracked == 3
    assert_same_state(block, wanted, atol=0, rtol=0)
    for p, q in zip(block.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_a_forward_pass_beside_a_backward_pass_counts():
    """Only the thread that runs the backward pass recomputes; gradients and hooks elsewhere change nothing."""
    layer, x = bnkit.nn.BatchNorm1d(3), torch.randn(4, 3, requires_grad=True)
    layer(x).sum().backward()
    layer(x)
    with torch.no_grad():
        layer(x)
    assert layer.num_batches_tracked == 3


def test_checkpointing_inside_a_compiled_function_counts_once():
    torch._dynamo.reset()
    block, x = Block(), torch.randn(2, 4, 6, 6, requires_grad=True)
    wanted = copy.deepcopy(block)
    wanted(x).sum().backward()
    compiled = torch.compile(lambda x: checkpoint(block, x, use_reentrant=False), backend="aot_eager", fullgraph=True)
    compiled(x).sum().backward()
    assert_same_state(block, wanted)


COMPILED = [{}, {"momentum": None}, {"skip_nonfinite": True}, {"affine": False}, {"track_running_stats": False}]


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("options", COMPILED, ids=str)
def test_compiles_without_graph_breaks(compiler, options):
    torch._dynamo.reset()
    layer, x = bnkit.nn.BatchNorm2d(4, activation="hardswish", **options), torch.randn(2, 4, 6, 6)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(twin, backend=compiler, fullgraph=True)
    for mode in (True, False):
        layer.train(mode)
        compiled.train(mode)
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        for call, z in zip((layer, compiled), inputs, strict=True):
            call(z, x).pow(3).sum().backward()
        torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
        assert_same_state(twin, layer)


def test_does_not_recompile_for_other_batch_sizes():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(bnkit.nn.BatchNorm2d(4, activation="relu"), backend=counter, fullgraph=True, dynamic=True)
    for size in (2, 3, 7, 20):
        compiled(torch.randn(size, 4, 6, 6))
    assert counter.frame_count == 1


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())

    def forward(self, x):
        return torch.relu(self.blocks(x))


def test_fx_traces_each_layer_as_one_call():
    """As it does for torch.nn's: the layer stays a layer, so train() and eval() still work on the traced model."""
    model, x = Wrapped(), torch.randn(2, 4, 6, 6)
    traced = torch.fx.symbolic_trace(copy.deepcopy(model))
    calls = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert [name for name in calls if "conv" not in name] == [
        "blocks.0.first",
        "blocks.0.last",
        "blocks.1.first",
        "blocks.1.last",
    ]
    for mode in (True, False):
        torch.testing.assert_close(traced.train(mode)(x), model.train(mode)(x))
    assert_same_state(traced, model)
    again = pickle.loads(pickle.dumps(traced))
    torch.testing.assert_close(again(x), model(x))


@pytest.mark.parametrize("training", [True, False])
def test_export(training):
    model, x = Wrapped().train(training), torch.randn(2, 4, 6, 6)
    size = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(copy.deepcopy(model), (x,), dynamic_shapes=({0: size},)).module()
    x = torch.randn(5, 4, 6, 6)
    torch.testing.assert_close(exported(x), model(x))
    for name, buffer in exported.named_buffers():
        torch.testing.assert_close(buffer, model.get_buffer(name))


def test_functional_call_and_inference_mode():
    layer, x = bnkit.nn.BatchNorm1d(3), torch.randn(4, 3)
    weight = torch.rand(3)
    y = torch.func.functional_call(layer, {"weight": weight}, (x,))
    torch.testing.assert_close(y, batch_norm(x, None, None, weight, torch.zeros(3), training=True))
    with torch.inference_mode():
        layer(x)
    assert layer.num_batches_tracked == 2  # as in torch.nn, neither no_grad nor inference_mode stops the tracking


def test_on_the_meta_device():
    layer = bnkit.nn.BatchNorm2d(4, device="meta")
    assert layer(torch.empty(2, 4, 3, 3, device="meta")).shape == (2, 4, 3, 3)
