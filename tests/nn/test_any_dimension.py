"""What all relatives of batch norm have in common: state, precision, compilation, checkpointing, guards."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import bnkit.nn

LAYERS = {
    "frozen": bnkit.nn.FrozenBatchNorm,
    "ghost": lambda *a, **k: bnkit.nn.GhostBatchNorm(*a, ghost_size=3, **k),
    "renorm": lambda *a, **k: bnkit.nn.BatchRenorm(*a, r_max=1.5, d_max=0.5, **k),
    "domain": lambda *a, **k: bnkit.nn.DomainBatchNorm(a[0], ("clean", "adversarial"), *a[1:], **k),
    "own affine": lambda *a, **k: bnkit.nn.DomainBatchNorm(a[0], 3, *a[1:], shared_affine=False, **k),
    "masked": bnkit.nn.MaskedBatchNorm,
    "recurrent": lambda *a, **k: bnkit.nn.RecurrentBatchNorm(*a, max_length=4, **k),
}
UPDATING = [kind for kind in LAYERS if kind != "frozen"]


def inputs(kind, x):
    """The arguments of a call that exercises what is special about the kind."""
    if kind == "masked":
        mask = torch.ones(x.shape[0], *x.shape[2:], dtype=torch.bool)
        mask[0, -1] = False
        return (x, mask)
    return (x, 2) if kind == "recurrent" else (x,)


def batch(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return (torch.randn(7, 4, 5) * 2 + 1).to(dtype)


def make(kind, **options):
    """A layer with random parameters and statistics that have seen a batch."""
    torch.manual_seed(1)
    layer = LAYERS[kind](4, **options)
    with torch.no_grad():
        for tensor in (*layer.parameters(), *layer.buffers()):
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)
        layer(*inputs(kind, batch(3, next((t.dtype for t in layer.buffers()), torch.float32))))
    return layer


def assert_same_state(ours, wanted, **tolerance):
    assert list(ours.state_dict()) == list(wanted.state_dict())
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, wanted.state_dict()[name], msg=lambda m, n=name: f"{n}: {m}", **tolerance)


@pytest.mark.parametrize("kind", LAYERS)
def test_is_a_batch_norm(kind):
    """Which FSDP's mixed precision, weight-decay groups and converters look for."""
    layer = LAYERS[kind](4, 1e-3, 0.2, True, True, "cpu", torch.float64)
    assert isinstance(layer, nn.modules.batchnorm._BatchNorm)
    assert (layer.eps, layer.momentum, layer.num_features, layer.affine) == (1e-3, 0.2, 4, True)
    assert {t.dtype for t in (*layer.parameters(), layer.running_mean, layer.running_var)} == {torch.float64}
    assert repr(layer).startswith(f"{type(layer).__name__}(4, eps=0.001, momentum=0.2")


@pytest.mark.parametrize("kind", LAYERS)
def test_state_dict_pickle_and_deepcopy(kind):
    layer = make(kind, activation="gelu", skip_nonfinite=True)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    loaded = LAYERS[kind](4, activation="gelu", skip_nonfinite=True)
    loaded.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True), strict=True)
    for twin in (loaded, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert repr(twin) == repr(layer)
        assert_same_state(twin, layer, atol=0, rtol=0)
        x = inputs(kind, batch(4))
        assert torch.equal(twin.eval()(*x), layer.eval()(*x))
        layer.train()


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("options", [{"affine": False}, {"bias": False}], ids=str)
def test_without_weight_or_bias(kind, options):
    """As with a weight of one and a bias of zero."""
    layer, full = LAYERS[kind](4, **options), LAYERS[kind](4)
    assert len(list(layer.parameters())) < len(list(full.parameters()))
    with torch.no_grad():
        for name, parameter in (*layer.named_parameters(), *full.named_parameters()):
            parameter.fill_(float(name.startswith("weight")))
    for mode in (True, False):
        ours, wanted = (each.train(mode)(*inputs(kind, batch())) for each in (layer, full))
        torch.testing.assert_close(ours, wanted)
    layer(*inputs(kind, batch().requires_grad_())).pow(3).sum().backward()


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("mode", [True, False])
def test_activation_and_residual(kind, mode):
    layer = make(kind).train(mode)
    plain = copy.deepcopy(layer)
    layer.activation = "silu"
    x, *rest = inputs(kind, batch())
    residual = torch.randn_like(x)
    y = layer(x, *rest, residual=residual)
    wanted = nn.functional.silu(plain(x, *rest) + residual)
    if kind == "masked":
        wanted = wanted * rest[0].unsqueeze(1)
    torch.testing.assert_close(y, wanted, atol=2e-6, rtol=2e-6)
    assert_same_state(layer, plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", LAYERS)
def test_low_precision_keeps_parameters_and_buffers_in_float32(kind, dtype):
    layer = make(kind)
    wanted = copy.deepcopy(layer)
    x = batch().to(dtype)
    with torch.autocast("cpu", dtype):
        y = layer(*inputs(kind, x))
    assert y.dtype == dtype
    y.backward(torch.randn_like(y))
    assert {t.dtype for t in (*layer.parameters(), layer.running_mean, layer.running_var)} == {torch.float32}
    assert {p.grad.dtype for p in layer.parameters() if p.grad is not None} == {torch.float32}
    exact = wanted(*inputs(kind, x.float()))
    torch.testing.assert_close(y.float(), exact, atol=0.0, rtol=torch.finfo(dtype).eps)
    assert_same_state(layer, wanted)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("kind", UPDATING)
def test_skip_nonfinite_keeps_the_batch_out(kind, bad, momentum):
    """3e38 is finite, its variance is not."""
    guarded, plain = (make(kind, momentum=momentum, skip_nonfinite=skip) for skip in (True, False))
    before = copy.deepcopy(guarded)
    poisoned = batch(8)
    poisoned[2, 1, 2] = bad
    guarded(*inputs(kind, poisoned))
    assert_same_state(guarded, before, atol=0, rtol=0)
    for seed in (5, 6):
        for layer in (guarded, plain):
            layer(*inputs(kind, batch(seed)))
    assert_same_state(guarded, plain, atol=0, rtol=0)


@pytest.mark.parametrize("kind", LAYERS)
def test_without_running_statistics(kind):
    if kind in ("frozen", "renorm"):
        with pytest.raises(ValueError, match="got track_running_stats=False: leave it True"):
            LAYERS[kind](4, track_running_stats=False)
        return
    layer, tracking = LAYERS[kind](4, track_running_stats=False), LAYERS[kind](4)
    assert list(layer.buffers()) == []
    y = layer(*inputs(kind, batch()))
    torch.testing.assert_close(layer.eval()(*inputs(kind, batch())), y)
    torch.testing.assert_close(tracking(*inputs(kind, batch())), y)


class Calls(nn.Module):
    """The layer between two others, called the way its kind asks for."""

    def __init__(self, kind, **options):
        super().__init__()
        self.kind = kind
        self.before, self.norm = nn.Conv1d(4, 4, 1), make(kind, **options)

    def forward(self, x):
        return self.norm(*inputs(self.kind, self.before(x))).sigmoid()


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_checkpointing_counts_each_batch_once(kind, use_reentrant, momentum):
    """Two forward passes before the backward pass, so that the statistics have moved on when it recomputes."""
    model = Calls(kind, momentum=momentum)
    wanted = copy.deepcopy(model)
    data = [batch(seed).requires_grad_() for seed in (5, 6)]
    for forward in (wanted, lambda x: checkpoint(model, x, use_reentrant=use_reentrant)):
        for _ in range(2):
            sum(forward(x).pow(3).sum() for x in data).backward()
    assert_same_state(model, wanted, atol=0, rtol=0)
    for (name, p), q in zip(model.named_parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"skip_nonfinite": True, "affine": False}], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_compiles_without_graph_breaks(kind, options):
    torch._dynamo.reset()
    layer = make(kind, activation="hardswish", **options)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    for mode in (True, False):
        layer.train(mode)
        compiled.train(mode)
        data = [batch().requires_grad_() for _ in range(2)]
        for call, x in zip((layer, compiled), data, strict=True):
            call(*inputs(kind, x)).pow(3).sum().backward()
        torch.testing.assert_close(data[1].grad, data[0].grad, atol=1e-4, rtol=1e-4)
        assert_same_state(twin, layer)


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_exports(kind, mode):
    layer = make(kind).train(mode)
    example = inputs(kind, batch())
    exported = torch.export.export(copy.deepcopy(layer), example).module()
    torch.testing.assert_close(exported(*example), layer(*example))


@pytest.mark.parametrize("kind", LAYERS)
def test_fx_records_one_call(kind):
    model = nn.Sequential(nn.Conv1d(4, 4, 1), make(kind)).eval()
    graph = torch.fx.symbolic_trace(model)
    assert [node.op for node in graph.graph.nodes] == ["placeholder", "call_module", "call_module", "output"]
    if kind != "recurrent":  # which needs a step
        torch.testing.assert_close(graph(batch()), model(batch()))


@pytest.mark.parametrize("kind", LAYERS)
def test_meta_construction_and_materialization(kind):
    """As FSDP and large-model loaders do: build without memory, then `to_empty` and `reset_parameters`."""
    layer = LAYERS[kind](4, device="meta").to_empty(device="cpu")
    layer.reset_parameters()
    assert_same_state(layer, LAYERS[kind](4), atol=0, rtol=0)


@pytest.mark.parametrize("kind", LAYERS)
def test_float64_gradients(kind):
    """Against finite differences where the layer is a function of its arguments alone, which renorm's is not."""
    layer = make(kind, dtype=torch.float64, activation="tanh")
    if kind == "renorm":
        layer.r_max, layer.d_max = 1.0, 0.0
    x, *rest = inputs(kind, batch(dtype=torch.float64))
    names = [name for name, _ in layer.named_parameters()]
    free = [name for name in names if not name.endswith(("_1", "_2"))]

    def function(x, residual, *values):
        twin = copy.deepcopy(layer)
        return torch.func.functional_call(
            twin, dict(zip(free, values, strict=True)), (x, *rest), {"residual": residual}
        )

    parameters = [dict(layer.named_parameters())[name] for name in free]
    arguments = (x.requires_grad_(), torch.randn_like(x, requires_grad=True), *parameters)
    assert torch.autograd.gradcheck(function, arguments, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, arguments, fast_mode=True)


@pytest.mark.parametrize("kind", [kind for kind in LAYERS if kind != "recurrent"])
@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 5), (6, 4, 3, 5), (6, 4, 2, 3, 2)], ids=str)
def test_any_dimension(kind, shape):
    """Two dimensions more or fewer are only another way to write the same values."""
    x = torch.randn(shape)
    flat = x.reshape(6, 4, -1) if x.dim() > 2 else x.unsqueeze(2)
    torch.testing.assert_close(make(kind)(x).reshape(flat.shape), make(kind)(flat))


@pytest.mark.parametrize("kind", LAYERS)
def test_wrong_shapes_are_refused(kind):
    with pytest.raises(ValueError, match=r"expected 4 channels, .* got \(7, 3, 5\): construct the layer with"):
        LAYERS[kind](4)(*inputs(kind, batch()[:, :3]))
