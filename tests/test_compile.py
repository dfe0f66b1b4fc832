"""torch.compile and torch.export of batch norm: which operators a graph holds, their values, and when it recompiles."""

from __future__ import annotations

import copy
import dataclasses
import shutil
from typing import Any

import oracle
import pytest
import torch
from functorch.compile import make_boxed_func
from oracle import make_case
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint

import bnkit.nn
from bnkit.functional import batch_norm
from bnkit.ops import cpu, dispatch

needs_kernels = pytest.mark.skipif(not cpu.available(), reason="installed without the C kernels")


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@dataclasses.dataclass
class Graphs:
    """A compiler that keeps the graphs it is given, forward and backward, and runs them as they are."""

    seen: list[str] = dataclasses.field(default_factory=list)

    def keep(self, graph, inputs):
        nodes = [node for node in graph.graph.nodes if node.op == "call_function"]
        operators = [node.args[0] if "auto_functionalized" in str(node.target) else node.target for node in nodes]
        self.seen.append(" ".join(map(str, operators)))
        return make_boxed_func(graph)

    def __call__(self, graph, inputs):
        return aot_autograd(fw_compiler=self.keep, bw_compiler=self.keep)(graph, inputs)


def ours(case: oracle.Case) -> Tensor:
    return batch_norm(
        case.x,
        case.running_mean,
        case.running_var,
        case.weight,
        case.bias,
        case.training,
        case.momentum,
        case.eps,
        activation=case.activation,
        residual=case.residual,
    )


# Each with the reason it is there.
CASES: dict[str, dict[str, Any]] = {
    "training": {"activation": "relu"},
    "inference": {"training": False, "activation": "gelu"},
    "residual": {"activation": "relu", "residual": True},
    "residual that only passes through": {"residual": True},
    "without parameters": {"affine": "none"},
    "weight alone": {"affine": "weight"},
    "channels_last": {"layout": "channels_last", "residual": True, "activation": "silu"},
    "strides that no kernel reads": {"layout": "sliced"},
    "bfloat16": {"dtype": torch.bfloat16, "layout": "channels_last", "activation": "hardswish"},
    "float16": {"dtype": torch.float16},
    "elu, which no kernel has": {"activation": "elu"},
}


@needs_kernels
@pytest.mark.parametrize("name", CASES)
def test_a_compiled_graph_runs_our_kernels(name):
    """To the bit what eager calls give, results in the same layout; running statistics to the last place."""
    case, graphs = make_case((4, 5, 6, 7), **CASES[name]), Graphs()
    compiled = torch.compile(ours, backend=graphs, fullgraph=True)
    wanted = oracle.run(case, ours)
    for key, tensor in oracle.run(case, compiled).items():
        if tensor is None or key.startswith("running"):
            torch.testing.assert_close(tensor, wanted[key])
        else:
            assert torch.equal(tensor, wanted[key]), key
            assert tensor.stride() == wanted[key].stride(), key
    forward, backward = graphs.seen
    assert "bnkit.batch_norm_forward" in forward
    assert "bnkit.batch_norm_backward" in backward
    assert "aten.sum" not in forward + backward, "something is computed by PyTorch's operators"


@needs_kernels
def test_inference_without_gradients():
    case, graphs = make_case((4, 5, 6, 7), training=False), Graphs()
    with torch.no_grad():
        y = torch.compile(ours, backend=graphs, fullgraph=True)(case)
    assert torch.equal(y, ours(case))
    assert "bnkit.batch_norm_forward" in graphs.seen[0]


def test_without_a_backend_a_graph_holds_plain_operators(monkeypatch):
    monkeypatch.setattr(dispatch, "BACKENDS", ())
    case, graphs = make_case((4, 5, 6, 7), activation="relu"), Graphs()
    compiled = torch.compile(ours, backend=graphs, fullgraph=True)
    oracle.assert_as_accurate(oracle.run(case, compiled), case)
    assert "aten.rsqrt" in graphs.seen[0]
    assert "bnkit" not in " ".join(graphs.seen)


class Net(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm1 = bnkit.nn.BatchNorm2d(8, activation="relu", **options)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm2 = bnkit.nn.BatchNorm2d(8, activation="relu", **options)

    def forward(self, x):
        h = self.norm1(self.conv1(x))
        return self.norm2(self.conv2(h), h).mean((2, 3))


def assert_same_step(net: nn.Module, twin: nn.Module, compiled, x: Tensor, **tolerance) -> None:
    """One forward and backward pass in `net`, and in `twin` by `compiled`: same outputs, gradients and buffers."""
    inputs = [x.clone(memory_format=torch.preserve_format).requires_grad_() for _ in range(2)]
    outputs = [net(inputs[0]), compiled(inputs[1])]
    dy = torch.randn_like(outputs[0])
    for y in outputs:
        y.backward(dy)
    torch.testing.assert_close(outputs[1], outputs[0], **tolerance)
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, **tolerance)
    for (name, p), q in zip(net.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, msg=lambda m, n=name: f"{n}: {m}", **tolerance)
    for (name, b), c in zip(net.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(c, b, msg=lambda m, n=name: f"{n}: {m}", **tolerance)
    net.zero_grad()
    twin.zero_grad()


class Norms(nn.Module):
    """No convolution, which has sizes at which it recompiles."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.first, self.last = (bnkit.nn.BatchNorm2d(3, activation="relu", **options) for _ in range(2))

    def forward(self, x):
        return self.last(self.first(2 * x), x)


def test_a_change_of_batch_size_recompiles_once_and_never_again():
    """The first size is taken for a constant; from the second on sizes are symbols."""
    net = Norms()
    twin = copy.deepcopy(net)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    for size in (4, 6):
        assert_same_step(net, twin, compiled, torch.randn(size, 3, 6, 5))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in (9, 3, 32, 300):
            assert_same_step(net, twin, compiled, torch.randn(size, 3, 6, 5))
    assert twin.first.num_batches_tracked == 6


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"skip_nonfinite": True}], ids=str)
def test_dynamic_shapes_compile_once(options):
    net = Norms(**options)
    twin = copy.deepcopy(net)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for shape in ((4, 3, 6, 5), (60, 3, 7, 9), (3, 3, 8, 4)):
            assert_same_step(net, twin, compiled, torch.randn(shape))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_inside_and_outside_of_the_compiled_function(dtype):
    net = Net().to(memory_format=torch.channels_last)
    twin = copy.deepcopy(net)
    x = torch.randn(4, 3, 6, 5).to(memory_format=torch.channels_last)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", dtype):
        assert_same_step(net, twin, compiled, x, rtol=2e-2, atol=2e-2)
    assert twin.norm1.running_mean.dtype == torch.float32

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(x):
        with torch.autocast("cpu", dtype):
            return twin(x)

    with torch.autocast("cpu", dtype):
        expected = net(x)
    torch.testing.assert_close(step(x), expected, rtol=2e-2, atol=2e-2)


@needs_kernels
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler")
def test_inductor_trains_with_our_kernels():
    """The default compiler, which lays tensors out as it likes and reuses their memory."""
    net = Net()
    twin = copy.deepcopy(net)
    compiled = torch.compile(twin, fullgraph=True, dynamic=True)
    for size in (4, 7):
        assert_same_step(net, twin, compiled, torch.randn(size, 3, 6, 5), rtol=1e-4, atol=1e-5)
    net.eval()
    twin.eval()
    with torch.no_grad():
        x = torch.randn(5, 3, 6, 5)
        torch.testing.assert_close(compiled(x), net(x), rtol=1e-4, atol=1e-5)


@needs_kernels
def test_checkpointing_inside_a_compiled_function():
    """The forward pass is repeated in the backward graph, without counting the batch twice."""
    net, graphs = Net(), Graphs()
    twin = copy.deepcopy(net)
    compiled = torch.compile(lambda x: checkpoint(twin, x, use_reentrant=False), backend=graphs, fullgraph=True)
    assert_same_step(net, twin, compiled, torch.randn(4, 3, 6, 5))
    assert "bnkit.batch_norm_forward" in graphs.seen[1]
    assert twin.norm1.num_batches_tracked == 1


def test_transforms_inside_a_compiled_function_run_on_plain_operators():
    mean, var = torch.randn(3), torch.rand(3) + 0.5

    def function(x):
        return batch_norm(x, mean, var, activation="tanh")

    x = torch.randn(5, 4, 3)
    expected = function(x.flatten(0, 1)).view(5, 4, 3)
    torch.testing.assert_close(torch.compile(torch.vmap(function), backend="aot_eager", fullgraph=True)(x), expected)
    gradient = torch.func.grad(lambda x: function(x).pow(3).sum())
    compiled = torch.compile(gradient, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x[0]), gradient(x[0]))


def test_inplace_has_no_effect_in_a_compiled_graph():
    layer = bnkit.nn.BatchNorm2d(4, activation="leaky_relu", inplace=True)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    assert_same_step(layer, twin, compiled, torch.randn(4, 4, 6, 5))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_exported_programs_hold_plain_operators(training, strict):
    """They have to run where this package is not, and to go to ONNX."""
    net, x = Net().train(training), torch.randn(4, 3, 6, 5)
    size = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(copy.deepcopy(net), (x,), dynamic_shapes=({0: size},), strict=strict)
    called = {node.target for node in program.graph.nodes if node.op == "call_function"}
    operators = {target for target in called if isinstance(target, torch._ops.OpOverload)}
    assert {target.namespace for target in operators} == {"aten"}
    x, module = torch.randn(7, 3, 6, 5), program.module()
    torch.testing.assert_close(module(x), net(x))
    for name, buffer in module.named_buffers():
        torch.testing.assert_close(buffer, net.get_buffer(name))


def test_exported_inference_decomposes_to_pointwise_operators():
    program = torch.export.export(Net().eval(), (torch.randn(4, 3, 6, 5),)).run_decompositions()
    called = {node.target for node in program.graph.nodes if node.op == "call_function"}
    assert all("batch_norm" not in str(target) for target in called)
